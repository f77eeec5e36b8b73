"""From the tensors of a call to the raw pointers and strides that the kernel takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, WriteCall
from pagedkv.attention.cpu.library import AttentionCallC, CacheC, WriteCallC

__all__ = ["DTYPES", "attention_structure", "readable_attention", "readable_write", "write_structure"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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


def readable_attention(call: AttentionCall) -> AttentionCall:
    """The call itself, or one with copies of those (small) tensors whose strides the kernel cannot walk.

    Of these, `out` is to be copied back.
    """
    rows = (call.query, call.out, call.block_tables)
    others = (
        call.seq_lens,
        call.query_start_loc,
        call.tasks,
        call.merges,
        call.tree_mask,
        call.sinks,
        call.alibi_slopes,
    )
    if all(tensor.stride(-1) == 1 for tensor in rows) and all(
        tensor is None or tensor.is_contiguous() for tensor in others
    ):
        return call
    return replace(
        call,
        query=_with_contiguous_rows(call.query),
        out=call.out if call.out.stride(-1) == 1 else call.out.new_empty(call.out.shape),
        block_tables=_with_contiguous_rows(call.block_tables),
        seq_lens=call.seq_lens.contiguous(),
        query_start_loc=call.query_start_loc.contiguous(),
        tasks=call.tasks.contiguous(),
        merges=call.merges.contiguous(),
        tree_mask=_contiguous(call.tree_mask),
        sinks=_contiguous(call.sinks),
        alibi_slopes=_contiguous(call.alibi_slopes),
    )


def attention_structure(call: AttentionCall) -> AttentionCallC:
    """A readable call as the kernel takes it: addresses, of tensors that the caller keeps until the kernel is done."""
    query, out, counts = call.query, call.out, call.counts
    # Field by field: keywords for all of them take 1 us more.
    c = AttentionCallC()
    _fill_cache(c.key, call.key_cache, call.k_scale)
    _fill_cache(c.value, call.value_cache, call.v_scale)
    c.query = query.data_ptr()
    c.block_tables = call.block_tables.data_ptr()
    c.seq_lens = call.seq_lens.data_ptr()
    c.query_start_loc = call.query_start_loc.data_ptr()
    c.tasks = call.tasks.data_ptr()
    c.merges = call.merges.data_ptr()
    c.tree_mask = _address(call.tree_mask)
    c.sinks = _address(call.sinks)
    c.alibi_slopes = _address(call.alibi_slopes)
    c.out = out.data_ptr()
    c.lse = _address(call.lse)
    c.query_token_stride, c.query_head_stride, _ = query.stride()
    c.out_token_stride, c.out_head_stride, _ = out.stride()
    c.table_stride = call.block_tables.stride(0)
    c.num_tasks = call.tasks.shape[1]
    c.num_decode_tasks = counts.num_decode_tasks
    c.num_merges = call.merges.shape[1]
    c.num_partial_tokens = counts.num_partial_tokens
    _, c.num_q_heads, _ = out.shape
    _, c.block_size, c.num_kv_heads, _ = call.key_cache.shape
    c.tree_words = 0 if call.tree_mask is None else call.tree_mask.shape[1]
    c.window_left = call.window_left
    c.window_right = call.window_right
    c.dtype = DTYPES[query.dtype]
    c.format = _FORMATS[call.key_cache.dtype]
    c.causal = call.causal
    c.scale = call.scale
    c.softcap = call.softcap
    return c


def readable_write(call: WriteCall) -> WriteCall:
    """The write itself, or one with copies of those tensors whose strides the kernel cannot walk."""
    value = call.value
    if call.key.stride(-1) == 1 and (value is None or value.stride(-1) == 1) and call.slot_mapping.is_contiguous():
        return call
    return replace(
        call,
        key=_with_contiguous_rows(call.key),
        value=None if value is None else _with_contiguous_rows(value),
        slot_mapping=call.slot_mapping.contiguous(),
    )


def write_structure(call: WriteCall) -> WriteCallC:
    """A readable write as the kernel takes it: addresses, of tensors that the caller keeps until the kernel is done."""
    c = WriteCallC()
    c.slots = call.slot_mapping.data_ptr()
    c.num_tokens, c.num_kv_heads, _ = call.key.shape
    c.block_size = call.key_cache.shape[1]
    c.dtype = DTYPES[call.key.dtype]
    c.format = _FORMATS[call.key_cache.dtype]
    sources, caches, token_strides, head_strides = c.source, c.cache, c.token_stride, c.head_stride
    sources[0] = call.key.data_ptr()
    _fill_cache(caches[0], call.key_cache, call.k_scale)
    token_strides[0], head_strides[0], _ = call.key.stride()
    if call.value is not None and call.value_cache is not None:
        sources[1] = call.value.data_ptr()
        _fill_cache(caches[1], call.value_cache, call.v_scale)
        token_strides[1], head_strides[1], _ = call.value.stride()
    return c


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
