"""New keys and values into the cache, quantised on the way as `formats.quantize` does, to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.attention.triton_kernels.numbers import fp8_codes, narrowed, rounded

__all__ = ["write_slots"]


@triton.jit
def _has_nan(tile):
    """Whether a row holds a NaN, which `tl.min` and `tl.max` pass over."""
    return tl.max((tile != tile).to(tl.int32), 1) > 0


@triton.jit
def _write_rows(
    new,
    cache,
    scales,
    slot_mapping,
    num_rows,
    num_heads,
    stride_new_token,
    stride_new_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_scale_block,
    stride_scale_slot,
    stride_scale_head,
    stride_scale_group,
    stride_scale_pair,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A row is one head of one token; in int4 one group of its channels, whose even and odd ones are read apart."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = rows % NUM_GROUPS
    head = rows // NUM_GROUPS % num_heads
    token = rows // NUM_GROUPS // num_heads
    slots = tl.load(slot_mapping + token, mask=rows < num_rows, other=-1)
    is_wanted = slots >= 0
    block_ids = slots // BLOCK_SIZE
    offsets = slots % BLOCK_SIZE
    new_rows = new + token * stride_new_token + head * stride_new_head
    cache_rows = cache + block_ids * stride_block + offsets * stride_slot + head * stride_head
    channels = tl.arange(0, CHANNELS)
    if FORMAT == "int4":
        mask = is_wanted[:, None] & (channels < GROUP_DIM // 2)[None, :]
        pointers = (new_rows + group * GROUP_DIM)[:, None] + 2 * channels[None, :]
        even = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(pointers + 1, mask=mask, other=0.0).to(tl.float32)
        lowest = tl.min(tl.where(mask, tl.minimum(even, odd), float("inf")), 1)
        largest = tl.max(tl.where(mask, tl.maximum(even, odd), -float("inf")), 1)
        # Rows that are not wanted have nothing between infinities.
        lowest = tl.where(is_wanted, lowest, 0.0)
        largest = tl.where(is_wanted, largest, 0.0)
        lowest = tl.where(_has_nan(even) | _has_nan(odd), float("nan"), lowest)
        minimum = narrowed(lowest, tl.bfloat16)
        step = narrowed(tl.div_rn(largest - minimum.to(tl.float32), tl.full((ROWS,), 15.0, tl.float32)), tl.bfloat16)
        base = minimum.to(tl.float32)[:, None]
        safe_step = tl.where(step.to(tl.float32) > 0, step.to(tl.float32), 1.0)[:, None]
        safe_step = tl.broadcast_to(safe_step, even.shape)
        low = tl.minimum(tl.maximum(rounded(tl.div_rn(even - base, safe_step)), 0.0), 15.0).to(tl.uint8)
        high = tl.minimum(tl.maximum(rounded(tl.div_rn(odd - base, safe_step)), 0.0), 15.0).to(tl.uint8)
        bytes_of_group = (cache_rows + group * (GROUP_DIM // 2))[:, None] + channels[None, :]
        tl.store(bytes_of_group, low | (high << 4), mask=mask)
        pair = scales + block_ids * stride_scale_block + offsets * stride_scale_slot + head * stride_scale_head
        pair += group * stride_scale_group
        tl.store(pair, step, mask=is_wanted)
        tl.store(pair + stride_scale_pair, minimum, mask=is_wanted)
    else:
        mask = is_wanted[:, None] & (channels < GROUP_DIM)[None, :]
        numbers = tl.load(new_rows[:, None] + channels[None, :], mask=mask, other=0.0)
        places = cache_rows[:, None] + channels[None, :]
        if FORMAT == "int8":
            numbers = numbers.to(tl.float32)
            step = tl.div_rn(tl.max(tl.abs(numbers), 1), tl.full((ROWS,), 127.0, tl.float32))
            step = tl.where(_has_nan(numbers), float("nan"), step)
            safe_step = tl.broadcast_to(tl.where(step > 0, step, 1.0)[:, None], numbers.shape)
            codes = rounded(tl.div_rn(numbers, safe_step))
            # Times a scale that is not finite, every code is NaN; of a NaN there is no code.
            codes = tl.where((step < float("inf"))[:, None], codes, 0.0)
            tl.store(places, codes.to(tl.int8), mask=mask)
            scale_rows = scales + block_ids * stride_scale_block + offsets * stride_scale_slot
            tl.store(scale_rows + head * stride_scale_head, step, mask=is_wanted)
        elif FORMAT == "float":
            tl.store(places, numbers, mask=mask)
        else:
            numbers = numbers.to(tl.float32)
            if scales is not None:
                scale = tl.load(scales + head * stride_scale_head)
                numbers = tl.div_rn(numbers, tl.broadcast_to(scale[:, None], numbers.shape))
            tl.store(places, fp8_codes(numbers, "e4m3" if FORMAT == "fp8_e4m3" else "e5m2"), mask=mask)


# What differs from call to call must not compile another kernel.
@triton.jit(do_not_specialize=["num_key_rows", "num_value_rows"])
def write_slots(
    key,
    value,
    key_cache,
    value_cache,
    k_scale,
    v_scale,
    slot_mapping,
    num_key_rows,
    num_value_rows,
    num_heads,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_key_block,
    stride_key_slot,
    stride_key_cache_head,
    stride_value_block,
    stride_value_slot,
    stride_value_cache_head,
    stride_k_scale_block,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_k_scale_group,
    stride_k_scale_pair,
    stride_v_scale_block,
    stride_v_scale_slot,
    stride_v_scale_head,
    stride_v_scale_group,
    stride_v_scale_pair,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_GROUP_DIM: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_GROUP_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` rows of the keys, or of the values where the grid's second index is 1. Slot -1 writes nothing."""
    if tl.program_id(1) == 0:
        _write_rows(
            key, key_cache, k_scale, slot_mapping, num_key_rows, num_heads,
            stride_key_token, stride_key_head, stride_key_block, stride_key_slot, stride_key_cache_head,
            stride_k_scale_block, stride_k_scale_slot, stride_k_scale_head, stride_k_scale_group, stride_k_scale_pair,
            FORMAT, BLOCK_SIZE, KEY_GROUPS, KEY_GROUP_DIM, KEY_CHANNELS, ROWS,
        )  # fmt: skip
    elif value is not None:
        _write_rows(
            value, value_cache, v_scale, slot_mapping, num_value_rows, num_heads,
            stride_value_token, stride_value_head, stride_value_block, stride_value_slot, stride_value_cache_head,
            stride_v_scale_block, stride_v_scale_slot, stride_v_scale_head, stride_v_scale_group, stride_v_scale_pair,
            FORMAT, BLOCK_SIZE, VALUE_GROUPS, VALUE_GROUP_DIM, VALUE_CHANNELS, ROWS,
        )  # fmt: skip
