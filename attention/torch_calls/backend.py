"""The torch backend: which sequences are attended together, and writing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.formats import quantize
from pagedkv.attention.partition import Partition
from pagedkv.attention.torch_calls.decodes import attend_folded
from pagedkv.attention.torch_calls.prefills import attend_prefill
from pagedkv.attention.torch_calls.setup import Setup

__all__ = ["TorchBackend"]

# Up to so many rows (query tokens x heads per KV head), all rows of a KV head become one small matrix.
MAX_FOLDED_ROWS = 64


class TorchBackend:
    """CPU and CUDA, every dtype and feature, in calls of torch alone.

    - Decodes on a CPU, from caches of floats, with few heads per KV head: keys are gathered, as many as stay in the
      second-level cache, widened and multiplied there; values are not gathered: `embedding_bag` adds them up where they
      lie. See `bags`.
    - All else on a CPU: keys and values are gathered into a workspace that stays in the last-level cache, and attended
      there by `aten::_scaled_dot_product_flash_attention_for_cpu`, which returns the LSE too.
    - With a soft-cap, and on CUDA: gathered likewise, and scores made by hand in float32.

    Chunks' results are merged by their LSE. float16 and quantised caches are computed in float32.

    Decode, 16 sequences of 4096 tokens, bfloat16, 32 query and 8 KV heads of 128, scattered blocks of 16, torch 2.13, one
    thread of Zen 3. CPU time for 4096 tokens, of which SDPA on contiguous keys and values, with query heads folded into
    rows, takes 3.7 to 5.3 ms:

    - bags, 6.2 to 7.5 ms: gather of keys 1.2, widening 0.9, products 1.2, softmax 0.3, values 1.9 from memory, the rest is
      calls. With reads of 256, 1024 and 2048 keys instead of 512: 7.5, 8 and 12
    - all gathered, 9 to 15 ms: gathers 2.5, attention in the cache 5.6 to 7
    - on two cores of Zen 4, whole sequences gathered instead of chunks: twice the time
    - rejected: bmm in bfloat16, whose scores are rounded (and 44 ms here); keys by the gradient of `embedding_bag`, which is a
      dot product per row, likewise rounded (9 ms); wider products of several heads at once (2.0 to 4.2 ms for 1.2)

    Beside all gathered, the same cache: MHA 1.9 to 2.3 times as fast, float32 1.5, float16 2.5, 16 rows a KV head 0.9 to 1.0, MLA
    0.76, one sequence of 512 tokens 0.87 for its calls. So 8 rows are the most. Prefill of 512 tokens on a prefix of 3584:
    1.0 of SDPA (Zen 4).
    """

    name = "torch"

    def unavailable(self) -> str | None:
        """Never: torch is there if this module is."""
        return None

    def runs_on(self, device_type: str) -> bool:
        """On CPU and CUDA."""
        return device_type in ("cpu", "cuda")

    def refuses(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def refuses_write(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """One task per sequence: tasks are not read, for torch divides the work of each of its calls itself."""
        return Partition(num_workers=1, max_decode_rows=2**30, query_tile=2**30, min_split=2**30)

    def know_attention(self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]) -> None:
        """Nothing: each call is checked."""

    def know_write(self, call: WriteCall, asked: str | None) -> None:
        """Nothing: each write is checked."""

    def describe(self) -> str:
        """The library it is written in."""
        return f"torch {torch.__version__}, gather and SDPA"

    @torch.no_grad()
    def attend(self, call: AttentionCall) -> None:
        """Decodes with the same number of query tokens together, then the prefills one by one."""
        setup = Setup.of(call)
        lengths = call.seq_lens.numpy(force=True).astype(np.int64)
        starts = call.query_start_loc.numpy(force=True).astype(np.int64)
        num_queries = np.diff(starts)
        is_folded = num_queries * setup.group <= MAX_FOLDED_ROWS
        for count in np.unique(num_queries[is_folded]).tolist():
            if count:
                seqs = (is_folded & (num_queries == count)).nonzero()[0]
                attend_folded(call, setup, seqs, starts[seqs], lengths[seqs], count)
        for seq_idx in (~is_folded).nonzero()[0].tolist():
            attend_prefill(call, setup, seq_idx, int(starts[seq_idx]), int(starts[seq_idx + 1]), int(lengths[seq_idx]))

    @torch.no_grad()
    def write(self, call: WriteCall) -> None:
        """Quantise where the cache is quantised, then one indexed assignment per cache."""
        wanted = call.slot_mapping >= 0
        slots = call.slot_mapping[wanted]
        _write(call.key[wanted], call.key_cache, slots, call.k_scale)
        if call.value is not None and call.value_cache is not None:
            _write(call.value[wanted], call.value_cache, slots, call.v_scale)


def _write(new: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    block_ids, offsets = slots // cache.shape[1], slots % cache.shape[1]
    codes, scales = quantize(new, cache.dtype, scale)
    if cache.dtype.itemsize == 1:
        # fp8 has no indexed assignment on every device.
        cache, codes = cache.view(torch.uint8), codes.contiguous().view(torch.uint8)
    cache[block_ids, offsets] = codes
    if scales is not None and scale is not None:
        scale[block_ids, offsets] = scales
