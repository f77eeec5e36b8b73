"""The backend on the processor: from tensors to raw pointers and strides."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.cpu.build import KernelBuildError, find_kernel
from pagedkv.attention.cpu.library import AttentionCallC, CacheC, Kernel, WriteCallC
from pagedkv.attention.partition import Partition

__all__ = ["CPUBackend"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# By the cache's dtype; an Enum as a key takes five times as long.
_FORMATS = {
    torch.float32: 0,
    torch.float16: 0,
    torch.bfloat16: 0,
    torch.float8_e4m3fn: 1,
    torch.float8_e5m2: 2,
    torch.int8: 3,
    torch.uint8: 4,
}
# Query rows of a prefill task: enough to make laying out a tile of keys cheap, few enough that their sums stay in L2. With tile
# registers (AMX) products are several times as fast and laying out weighs more, and L2 has 2 MB.
PREFILL_ROWS = 256
TILED_PREFILL_ROWS = 512
MAX_DECODE_ROWS = 16
MIN_SPLIT = 256


class CPUBackend:
    """The C kernel. Float32, float16, bfloat16 and every quantised format, every feature, any block size.

    It is compiled at first use where the package did not bring it; without a compiler one warning says so, once.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._kernel: Kernel | None = None
        self._reason: str | None = None

    def unavailable(self) -> str | None:
        """Why there is no compiled kernel; None if there is one. The first call may compile it."""
        if self._kernel is None and self._reason is None:
            try:
                self._kernel = Kernel(find_kernel())
            except (KernelBuildError, OSError) as error:
                self._reason = str(error)
                warnings.warn(
                    f"pagedkv computes attention with torch, several times slower, for want of its C kernel: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._reason

    @property
    def kernel(self) -> Kernel:
        """The loaded library."""
        if self._kernel is None:
            raise RuntimeError(f"the C kernel is not available: {self.unavailable()}")
        return self._kernel

    def runs_on(self, device_type: str) -> bool:
        """On the processor."""
        return device_type == "cpu"

    def refuses(self, features: Features) -> str | None:
        """Float64."""
        return (
            None if features.dtype in _DTYPES else f"it computes in float32, float16 and bfloat16, not {features.dtype}"
        )

    def refuses_write(self, features: Features) -> str | None:
        """Float64."""
        return self.refuses(features)

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """As many workers as torch has threads; tiles of about PREFILL_ROWS rows, or TILED_PREFILL_ROWS."""
        has_tiles = self._kernel is not None and "amx" in self._kernel.in_use
        prefill_rows = TILED_PREFILL_ROWS if has_tiles else PREFILL_ROWS
        return _partition(torch.get_num_threads(), num_q_heads // num_kv_heads, num_kv_heads, prefill_rows)

    def describe(self) -> str:
        """The instruction set, and whose threads."""
        kernel = self.kernel
        threads = "torch's OpenMP threads" if kernel.shares_threads else "its own threads"
        return f"C kernel with {', '.join(kernel.in_use)}, on {threads}"

    def attend(self, call: AttentionCall) -> None:
        """Hand the call over by address. Small tensors that are not contiguous are copied first."""
        counts = call.counts
        # Kept in variables until the kernel is done: it sees only addresses.
        query, query_strides = _with_contiguous_rows(call.query)
        out = call.out
        out_strides = out.stride()
        if out_strides[2] != 1:
            out = out.new_empty(out.shape)
            out_strides = out.stride()
        _, num_q_heads, value_dim = out.shape
        _, block_size, num_kv_heads, _ = call.key_cache.shape
        tables, table_strides = _with_contiguous_rows(call.block_tables)
        lengths, starts = call.seq_lens.contiguous(), call.query_start_loc.contiguous()
        tasks, merges = call.tasks.contiguous(), call.merges.contiguous()
        tree_mask, sinks, slopes = _contiguous(call.tree_mask), _contiguous(call.sinks), _contiguous(call.alibi_slopes)
        num_partials = counts.num_partial_tokens * num_q_heads
        partial = torch.empty(num_partials * (value_dim + 1), dtype=torch.float32) if num_partials else None
        # Filled anew for each call: nothing is kept from which an old address could come back, or that threads share.
        # Field by field: keywords for all of them take 1 us more.
        c = AttentionCallC()
        _fill_cache(c.key, call.key_cache, call.k_scale)
        _fill_cache(c.value, call.value_cache, call.v_scale)
        c.query = query.data_ptr()
        c.block_tables = tables.data_ptr()
        c.seq_lens = lengths.data_ptr()
        c.query_start_loc = starts.data_ptr()
        c.tasks = tasks.data_ptr()
        c.merges = merges.data_ptr()
        c.tree_mask = _address(tree_mask)
        c.sinks = _address(sinks)
        c.alibi_slopes = _address(slopes)
        c.out = out.data_ptr()
        c.lse = _address(call.lse)
        if partial is not None:
            c.partial_out = partial.data_ptr()
            c.partial_lse = partial.data_ptr() + 4 * num_partials * value_dim
        c.query_token_stride, c.query_head_stride, _ = query_strides
        c.out_token_stride, c.out_head_stride, _ = out_strides
        c.table_stride = table_strides[0]
        c.num_tasks = tasks.shape[1]
        c.num_decode_tasks = counts.num_decode_tasks
        c.num_merges = merges.shape[1]
        c.num_partial_tokens = counts.num_partial_tokens
        c.num_q_heads = num_q_heads
        c.num_kv_heads = num_kv_heads
        c.block_size = block_size
        c.tree_words = 0 if tree_mask is None else tree_mask.shape[1]
        c.window_left = call.window_left
        c.window_right = call.window_right
        c.dtype = _DTYPES[query.dtype]
        c.format = _FORMATS[call.key_cache.dtype]
        c.causal = call.causal
        c.scale = call.scale
        c.softcap = call.softcap
        self.kernel.attend(c, torch.get_num_threads())
        if out is not call.out:
            call.out.copy_(out)

    def write(self, call: WriteCall) -> None:
        """Hand the write over by address."""
        slots = call.slot_mapping.contiguous()
        key, key_strides = _with_contiguous_rows(call.key)
        c = WriteCallC()
        c.slots = slots.data_ptr()
        c.num_tokens, c.num_kv_heads, _ = key.shape
        c.block_size = call.key_cache.shape[1]
        c.dtype = _DTYPES[key.dtype]
        c.format = _FORMATS[call.key_cache.dtype]
        sources, caches, token_strides, head_strides = c.source, c.cache, c.token_stride, c.head_stride
        sources[0] = key.data_ptr()
        _fill_cache(caches[0], call.key_cache, call.k_scale)
        token_strides[0], head_strides[0], _ = key_strides
        if call.value is not None and call.value_cache is not None:
            value, value_strides = _with_contiguous_rows(call.value)
            sources[1] = value.data_ptr()
            _fill_cache(caches[1], call.value_cache, call.v_scale)
            token_strides[1], head_strides[1], _ = value_strides
        self.kernel.write(c, torch.get_num_threads())


@lru_cache(maxsize=64)
def _partition(num_workers: int, group: int, num_kv_heads: int, prefill_rows: int) -> Partition:
    return Partition(
        num_workers=num_workers,
        max_decode_rows=max(MAX_DECODE_ROWS, group),
        query_tile=max(prefill_rows // group, 1),
        min_split=MIN_SPLIT,
        prefill_units=num_kv_heads,
        shares_prefixes=True,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _with_contiguous_rows(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor, or a copy of it, with a last stride of 1; and its strides."""
    strides = tensor.stride()
    if strides[-1] == 1:
        return tensor, strides
    tensor = tensor.contiguous()
    return tensor, tensor.stride()


def _fill_cache(c: CacheC, cache: Tensor, scale: Tensor | None) -> None:
    is_int4 = cache.dtype == torch.uint8
    c.data = cache.data_ptr()
    c.block_stride, c.slot_stride, c.head_stride, _ = cache.stride()
    c.dim = cache.shape[3] * (2 if is_int4 else 1)
    if scale is not None:
        c.scale = scale.data_ptr()
        if scale.ndim == 1:
            c.scale_head_stride = scale.stride(0)
        elif scale.ndim >= 3:
            c.scale_block_stride, c.scale_slot_stride, c.scale_head_stride = scale.stride()[:3]
        if is_int4:
            c.group_size = c.dim // scale.shape[3]
