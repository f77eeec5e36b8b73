"""The backend on the processor: from tensors to raw pointers and strides."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.cpu.build import KernelBuildError, find_kernel
from pagedkv.attention.cpu.library import AttentionCallC, CacheC, Kernel, WriteCallC
from pagedkv.attention.formats import CacheFormat, format_of
from pagedkv.attention.partition import Partition

__all__ = ["CPUBackend"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FORMATS = {
    CacheFormat.FLOAT: 0,
    CacheFormat.FP8_E4M3: 1,
    CacheFormat.FP8_E5M2: 2,
    CacheFormat.INT8: 3,
    CacheFormat.INT4: 4,
}
# Query rows of a prefill task: enough to make laying out a tile of keys cheap, few enough that their sums stay in L2.
PREFILL_ROWS = 256
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
        """As many workers as torch has threads; tiles of about PREFILL_ROWS rows."""
        group = num_q_heads // num_kv_heads
        return Partition(
            num_workers=torch.get_num_threads(),
            max_decode_rows=max(MAX_DECODE_ROWS, group),
            query_tile=max(PREFILL_ROWS // group, 1),
            min_split=MIN_SPLIT,
        )

    def describe(self) -> str:
        """The instruction set, and whose threads."""
        kernel = self.kernel
        threads = "torch's OpenMP threads" if kernel.shares_threads else "its own threads"
        return f"C kernel with {', '.join(kernel.in_use)}, on {threads}"

    def attend(self, call: AttentionCall) -> None:
        """Hand the call over by address. Small tensors that are not contiguous are copied first."""
        num_q_heads, value_dim = call.out.shape[1:]
        counts = call.counts
        # Kept in variables until the kernel is done: it sees only addresses.
        query = call.query if call.query.stride(2) == 1 else call.query.contiguous()
        out = call.out if call.out.stride(2) == 1 else call.out.new_empty(call.out.shape)
        tables = call.block_tables if call.block_tables.stride(1) == 1 else call.block_tables.contiguous()
        lengths, starts = call.seq_lens.contiguous(), call.query_start_loc.contiguous()
        tasks, merges = call.tasks.contiguous(), call.merges.contiguous()
        optional = [None if x is None else x.contiguous() for x in (call.tree_mask, call.sinks, call.alibi_slopes)]
        tree_mask, sinks, slopes = optional
        partial = torch.empty(counts.num_partial_tokens * num_q_heads * (value_dim + 1), dtype=torch.float32)
        c = AttentionCallC(
            query=query.data_ptr(),
            key=_cache(call.key_cache, call.k_scale),
            value=_cache(call.value_cache, call.v_scale),
            block_tables=tables.data_ptr(),
            seq_lens=lengths.data_ptr(),
            query_start_loc=starts.data_ptr(),
            tasks=tasks.data_ptr(),
            merges=merges.data_ptr(),
            tree_mask=_address(tree_mask),
            sinks=_address(sinks),
            alibi_slopes=_address(slopes),
            out=out.data_ptr(),
            lse=_address(call.lse),
            partial_out=partial.data_ptr(),
            partial_lse=partial.data_ptr() + 4 * counts.num_partial_tokens * num_q_heads * value_dim,
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            table_stride=tables.stride(0),
            num_tasks=tasks.shape[1],
            num_decode_tasks=counts.num_decode_tasks,
            num_merges=merges.shape[1],
            num_partial_tokens=counts.num_partial_tokens,
            num_q_heads=num_q_heads,
            num_kv_heads=call.key_cache.shape[2],
            block_size=call.key_cache.shape[1],
            tree_words=0 if tree_mask is None else tree_mask.shape[1],
            window_left=call.window_left,
            window_right=call.window_right,
            dtype=_DTYPES[query.dtype],
            format=_format(call.key_cache),
            causal=call.causal,
            scale=call.scale,
            softcap=call.softcap,
        )
        self.kernel.attend(c, torch.get_num_threads())
        if out is not call.out:
            call.out.copy_(out)

    def write(self, call: WriteCall) -> None:
        """Hand the write over by address."""
        key = call.key if call.key.stride(2) == 1 else call.key.contiguous()
        value = call.value if call.value is None or call.value.stride(2) == 1 else call.value.contiguous()
        slots = call.slot_mapping.contiguous()
        c = WriteCallC(
            slots=slots.data_ptr(),
            num_tokens=key.shape[0],
            num_kv_heads=key.shape[1],
            block_size=call.key_cache.shape[1],
            dtype=_DTYPES[key.dtype],
            format=_format(call.key_cache),
        )
        both = ((key, call.key_cache, call.k_scale), (value, call.value_cache, call.v_scale))
        for i, (source, cache, scale) in enumerate(both):
            if source is not None and cache is not None:
                c.source[i] = source.data_ptr()
                c.cache[i] = _cache(cache, scale)
                c.token_stride[i], c.head_stride[i] = source.stride(0), source.stride(1)
        self.kernel.write(c, torch.get_num_threads())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _format(cache: Tensor) -> int:
    cache_format = format_of(cache.dtype)
    if cache_format is None:
        raise TypeError(f"{cache.dtype} is no cache format")
    return _FORMATS[cache_format]


def _cache(cache: Tensor, scale: Tensor | None) -> CacheC:
    is_int4 = cache.dtype == torch.uint8
    c = CacheC(
        data=cache.data_ptr(),
        block_stride=cache.stride(0),
        slot_stride=cache.stride(1),
        head_stride=cache.stride(2),
        dim=cache.shape[3] * (2 if is_int4 else 1),
    )
    if scale is not None:
        c.scale = scale.data_ptr()
        if scale.ndim == 1:
            c.scale_head_stride = scale.stride(0)
        elif scale.ndim >= 3:
            c.scale_block_stride, c.scale_slot_stride, c.scale_head_stride = scale.stride()[:3]
        if is_int4:
            c.group_size = c.dim // scale.shape[3]
    return c
