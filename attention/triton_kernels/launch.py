"""From a call's tensors to the kernels' arguments: grids, strides, tiles and workspaces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.formats import CacheFormat, format_of
from pagedkv.attention.triton_kernels.attend import attend_tasks
from pagedkv.attention.triton_kernels.backend import is_interpreted
from pagedkv.attention.triton_kernels.reduce import merge_splits
from pagedkv.attention.triton_kernels.tiles import (
    Tile,
    decode_rows,
    key_parts,
    next_power_of_two,
    prefill_rows,
    tile_for,
    value_parts,
)
from pagedkv.attention.triton_kernels.write import write_slots

__all__ = ["attend", "write"]

# The kernels count on fused multiply-adds; Triton 3.9 warns where it is not told.
_OPTIONS = {"enable_fp_fusion": True}
# Elements that a program of four warps holds at a time.
_ELEMENTS = 2048


def attend(call: AttentionCall, tile: Tile | None = None) -> None:
    """Write `call.out` and `call.lse`. `tile` replaces the choice by shape, for measuring."""
    if call.query.shape[0] == 0:
        return
    out = (
        call.out
        if call.out.stride(2) == 1
        else torch.empty(call.out.shape, dtype=call.out.dtype, device=call.out.device)
    )
    lse = None if call.lse is None else call.lse.contiguous()
    shape = (call.counts.num_partial_tokens, *out.shape[1:])
    partial_out = torch.empty(shape, dtype=torch.float32, device=out.device)
    partial_lse = torch.empty(shape[:2], dtype=torch.float32, device=out.device)
    places = {"out": out, "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse}
    with _device_of(out):
        if call.counts.num_decode_tasks:
            _launch_tasks(call, places, is_decode=True, tile=tile)
        if call.counts.num_prefill_tasks:
            _launch_tasks(call, places, is_decode=False, tile=tile)
        if call.counts.num_merges:
            _launch_merges(call, places)
    if out is not call.out:
        call.out.copy_(out)
    if lse is not None and call.lse is not None and lse is not call.lse:
        call.lse.copy_(lse)


def _launch_tasks(call: AttentionCall, places: dict[str, Tensor | None], *, is_decode: bool, tile: Tile | None) -> None:
    num_q_heads, num_kv_heads = call.query.shape[1], call.key_cache.shape[2]
    group = num_q_heads // num_kv_heads
    features = _features(call)
    tile = tile or tile_for(features, is_decode=is_decode, is_interpreted=is_interpreted())
    row_tiles = -(-(decode_rows(group) if is_decode else prefill_rows(group)) // tile.rows)
    num_tasks = call.counts.num_decode_tasks if is_decode else call.counts.num_prefill_tasks
    attend_tasks[(num_tasks * num_kv_heads * row_tiles,)](
        **places,
        **_tensors(call),
        **_shapes(call, features),
        scale=float(call.scale),
        softcap=float(call.softcap),
        window_left=call.window_left,
        window_right=0 if call.causal else call.window_right,
        first_task=0 if is_decode else call.counts.num_decode_tasks,
        num_kv_heads=num_kv_heads,
        stride_out_token=_stride(places["out"], 0),
        stride_out_head=_stride(places["out"], 1),
        HAS_LEFT=call.window_left >= 0,
        HAS_RIGHT=call.causal or call.window_right >= 0,
        HAS_SOFTCAP=call.softcap > 0,
        IS_PLAIN=_is_plain(call),
        IN_FLOAT16=is_decode and _is_cheaper_in_float16(features),
        ROWS=tile.rows,
        ROW_TILES=row_tiles,
        KEYS=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **_OPTIONS,
    )


def _is_cheaper_in_float16(features: Features) -> bool:
    """Whether a decode of bfloat16 queries converts one-byte codes to float16, which takes half the instructions.

    Not where wgmma multiplies, in prefills and for the latent of MLA: there the query, which has to be scaled for float16,
    would stay in registers instead of shared memory, and these run out.
    """
    has_codes = features.cache_format not in (CacheFormat.FLOAT, CacheFormat.INT4)
    return has_codes and features.dtype == torch.bfloat16 and features.head_dim <= 256


def _is_plain(call: AttentionCall) -> bool:
    """Whether a score is a product times a number that is not negative."""
    has_factor = call.k_scale is not None and call.k_scale.ndim < 3
    return call.scale >= 0 and call.softcap == 0 and call.alibi_slopes is None and not has_factor


def _features(call: AttentionCall) -> Features:
    num_q_heads, head_dim = call.query.shape[1:]
    return Features(
        device=call.query.device,
        dtype=call.query.dtype,
        cache_format=_format(call.key_cache),
        block_size=call.key_cache.shape[1],
        num_q_heads=num_q_heads,
        num_kv_heads=call.key_cache.shape[2],
        head_dim=head_dim,
        value_dim=call.out.shape[2],
    )


def _tensors(call: AttentionCall) -> dict[str, Any]:
    """What the kernel reads, and the strides of it."""
    query = call.query if call.query.stride(2) == 1 else call.query.contiguous()
    tables = call.block_tables if call.block_tables.stride(1) == 1 else call.block_tables.contiguous()
    tree = call.tree_mask if call.tree_mask is None or call.tree_mask.stride(1) == 1 else call.tree_mask.contiguous()
    tasks = call.tasks if call.tasks.stride(1) == 1 else call.tasks.contiguous()
    tensors: dict[str, Any] = {
        "query": query,
        "key_cache": _plain(call.key_cache),
        "value_cache": _plain(call.value_cache),
        "block_tables": tables,
        "seq_lens": call.seq_lens.contiguous(),
        "query_start_loc": call.query_start_loc.contiguous(),
        "tasks": tasks,
        "sinks": None if call.sinks is None else call.sinks.contiguous(),
        "alibi_slopes": None if call.alibi_slopes is None else call.alibi_slopes.contiguous(),
        "tree_mask": tree,
        "stride_query_token": query.stride(0),
        "stride_query_head": query.stride(1),
        "stride_table": tables.stride(0),
        "stride_tasks": tasks.stride(0),
        "stride_tree": _stride(tree, 0),
    }
    for name, cache in (("key", call.key_cache), ("value", call.value_cache)):
        for dim, what in enumerate(("block", "slot", "head")):
            tensors[f"stride_{name}_{what}"] = cache.stride(dim)
    for name, scale in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
        if scale is not None and scale.ndim == 5:
            # A step and a minimum in one number of 32 bits: one load instead of two.
            scale = (scale if scale.stride(4) == 1 else scale.contiguous()).view(torch.int32)
        tensors[name] = scale
        tensors |= _scale_strides(name, scale)
    return tensors


def _shapes(call: AttentionCall, features: Features) -> dict[str, Any]:
    """What the kernel is compiled for."""
    is_int4 = features.cache_format is CacheFormat.INT4
    keys = key_parts(features.head_dim, features.cache_format)
    values = value_parts(features.value_dim, features.cache_format)
    key_cache, value_cache = call.key_cache, call.value_cache
    values_are_keys = (
        not is_int4
        and value_cache.data_ptr() == key_cache.data_ptr()
        and value_cache.stride() == key_cache.stride()
        and values.b == 0
        and features.value_dim == values.a == keys.a
    )
    return {
        "FORMAT": features.cache_format.value,
        "GROUP": features.num_q_heads // features.num_kv_heads,
        "BLOCK_SIZE": features.block_size,
        "HEAD_DIM": features.head_dim,
        "KEY_A": keys.a,
        "KEY_B": keys.b,
        "VALUE_DIM": features.value_dim,
        "VALUE_A": values.a,
        "VALUE_B": values.b,
        "KEY_GROUP_BYTES": features.head_dim // call.k_scale.shape[3] // 2
        if is_int4 and call.k_scale is not None
        else 1,
        "VALUE_GROUP_BYTES": features.value_dim // call.v_scale.shape[3] // 2
        if is_int4 and call.v_scale is not None
        else 1,
        "VALUES_ARE_KEYS": values_are_keys,
    }


def _launch_merges(call: AttentionCall, places: dict[str, Tensor | None]) -> None:
    num_q_heads, value_dim = call.out.shape[1:]
    channels = next_power_of_two(value_dim)
    # A prefill's merge has many tokens, a decode's mostly one.
    programs = num_q_heads * (8 if call.counts.num_prefill_tasks else 1)
    merges = call.merges if call.merges.stride(1) == 1 else call.merges.contiguous()
    merge_splits[(call.counts.num_merges * programs,)](
        **places,
        merges=merges,
        sinks=None if call.sinks is None else call.sinks.contiguous(),
        num_q_heads=num_q_heads,
        stride_out_token=_stride(places["out"], 0),
        stride_out_head=_stride(places["out"], 1),
        stride_merges=merges.stride(0),
        VALUE_DIM=value_dim,
        CHANNELS=channels,
        SPLITS=max(_ELEMENTS // channels, 1),
        PROGRAMS=programs,
        num_warps=4,
        **_OPTIONS,
    )


def write(call: WriteCall) -> None:
    """Write keys, and values where there are any, into their caches."""
    num_tokens, num_heads, _ = call.key.shape
    if num_tokens == 0:
        return
    arguments: dict[str, Any] = {}
    most_rows, most_channels = 0, 1
    sides = (("key", call.key, call.key_cache, call.k_scale), ("value", call.value, call.value_cache, call.v_scale))
    for name, new, cache, scale in sides:
        if new is not None and new.stride(2) != 1:
            new = new.contiguous()
        is_int4 = scale is not None and scale.ndim == 5
        num_groups = scale.shape[3] if scale is not None and is_int4 else 1
        group_dim = 1 if new is None else new.shape[2] // num_groups
        channels = next_power_of_two(group_dim // 2 if is_int4 else group_dim)
        num_rows = num_tokens * num_heads * num_groups
        most_rows, most_channels = max(most_rows, num_rows), max(most_channels, channels)
        arguments |= {
            name: new,
            f"{name}_cache": None if cache is None else _plain(cache),
            f"{name[0]}_scale": scale,
            f"num_{name}_rows": num_rows,
            f"stride_{name}_token": _stride(new, 0),
            f"stride_{name}_head": _stride(new, 1),
            f"stride_{name}_block": _stride(cache, 0),
            f"stride_{name}_slot": _stride(cache, 1),
            f"stride_{name}_cache_head": _stride(cache, 2),
            f"stride_{name[0]}_scale_pair": _stride(scale, 4),
            f"{name.upper()}_GROUPS": num_groups,
            f"{name.upper()}_GROUP_DIM": group_dim,
            f"{name.upper()}_CHANNELS": channels,
            **_scale_strides(f"{name[0]}_scale", scale),
        }
    rows = max(_ELEMENTS // most_channels, 1)
    with _device_of(call.key):
        write_slots[(-(-most_rows // rows), 1 if call.value is None else 2)](
            **arguments,
            slot_mapping=call.slot_mapping.contiguous(),
            num_heads=num_heads,
            FORMAT=_format(call.key_cache).value,
            BLOCK_SIZE=call.key_cache.shape[1],
            ROWS=rows,
            num_warps=4,
            **_OPTIONS,
        )


def _format(cache: Tensor) -> CacheFormat:
    cache_format = format_of(cache.dtype)
    if cache_format is None:  # pragma: no cover - the checks have seen to it
        raise TypeError(f"{cache.dtype} is no cache format")
    return cache_format


def _plain(cache: Tensor) -> Tensor:
    """The cache; fp8 as bytes, which every version and device takes."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 and cache.dtype.is_floating_point else cache


def _stride(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None or tensor.ndim <= dim else tensor.stride(dim)


def _scale_strides(name: str, scale: Tensor | None) -> dict[str, int]:
    """One per token: by block, slot, head and group. One per head: by head. One for all: no strides."""
    if scale is not None and scale.ndim < 3:
        return {
            f"stride_{name}_{what}": _stride(scale, 0) if what == "head" else 0
            for what in ("block", "slot", "head", "group")
        }
    return {f"stride_{name}_{what}": _stride(scale, dim) for dim, what in enumerate(("block", "slot", "head", "group"))}


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
