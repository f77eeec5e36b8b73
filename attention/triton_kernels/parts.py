"""Tiles of cached keys and values, and of outputs: where a head's two parts lie, and what their codes mean.

Heads come in two parts, a and b, each as wide as a power of two: 576 channels are 512 and 64 instead of 1024. The two
channels that share a byte in int4 are never sorted: a holds the even ones, b the odd ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.attention.triton_kernels.numbers import decoded, narrowed, small_to_float

__all__ = ["channels_of", "read_parts", "store_parts"]


@triton.jit
def _load_tile(
    rows,
    columns,
    in_range,
    NUM_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Elements `columns` of the rows that start at the pointers `rows`; zero out of range, and then nothing is read."""
    if TRANSPOSED:
        pointers = rows[None, :] + columns[:, None]
        row_mask = in_range[None, :]
        column_mask = (columns < NUM_COLUMNS)[:, None]
    else:
        pointers = rows[:, None] + columns[None, :]
        row_mask = in_range[:, None]
        column_mask = (columns < NUM_COLUMNS)[None, :]
    if MASKED and WIDTH != NUM_COLUMNS:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0)
    elif MASKED:
        tile = tl.load(pointers, mask=row_mask, other=0)
    elif WIDTH != NUM_COLUMNS:
        tile = tl.load(pointers, mask=column_mask, other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _nibbles(codes, scales, dtype: tl.constexpr):
    """The even and the odd channels of int4 codes. scales: the bits of (step, minimum), two bfloat16, in one int32."""
    step = (scales << 16).to(tl.float32, bitcast=True)
    minimum = (scales & -65536).to(tl.float32, bitcast=True)
    even = small_to_float(codes & 15) * step + minimum
    odd = small_to_float(codes >> 4) * step + minimum
    return narrowed(even, dtype), narrowed(odd, dtype)


@triton.jit
def _load_scales(
    rows,
    stride_group,
    columns,
    in_range,
    NUM_BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The scales of int4, one for every byte of a tile."""
    NUM_GROUPS: tl.constexpr = NUM_BYTES // GROUP_BYTES
    if WIDTH == NUM_BYTES and NUM_GROUPS & (NUM_GROUPS - 1) == 0:
        # Powers of two: each group's scale is read once, and spread in registers.
        groups = tl.arange(0, NUM_GROUPS)
        if TRANSPOSED:
            pointers = rows[None, :] + groups[:, None] * stride_group
            mask = in_range[None, :]
        else:
            pointers = rows[:, None] + groups[None, :] * stride_group
            mask = in_range[:, None]
        if MASKED:
            scales = tl.load(pointers, mask=mask, other=0)
        else:
            scales = tl.load(pointers)
        NUM_ROWS: tl.constexpr = rows.shape[0]
        if TRANSPOSED:
            spread = tl.broadcast_to(scales[:, None, :], (NUM_GROUPS, GROUP_BYTES, NUM_ROWS))
            spread = tl.reshape(spread, (WIDTH, NUM_ROWS))
        else:
            spread = tl.broadcast_to(scales[:, :, None], (NUM_ROWS, NUM_GROUPS, GROUP_BYTES))
            spread = tl.reshape(spread, (NUM_ROWS, WIDTH))
    else:
        offsets = (columns // GROUP_BYTES) * stride_group
        if TRANSPOSED:
            pointers = rows[None, :] + offsets[:, None]
            mask = in_range[None, :] & (columns < NUM_BYTES)[:, None]
        else:
            pointers = rows[:, None] + offsets[None, :]
            mask = in_range[:, None] & (columns < NUM_BYTES)[None, :]
        spread = tl.load(pointers, mask=mask, other=0)
    return spread


@triton.jit
def read_parts(
    rows,
    scale_rows,
    stride_scale_group,
    in_range,
    DIM: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Both parts of a tile of keys or values, as numbers in DTYPE but for the factors that scores or outputs take later.

    `rows` and `scale_rows` point to the tile's rows. b is a itself where there is no part b.
    """
    columns = tl.arange(0, PART_A)
    if FORMAT == "int4":
        NUM_BYTES: tl.constexpr = DIM // 2
        codes = _load_tile(rows, columns, in_range, NUM_BYTES, PART_A, MASKED, TRANSPOSED)
        scales = _load_scales(
            scale_rows, stride_scale_group, columns, in_range, NUM_BYTES, PART_A, GROUP_BYTES, MASKED, TRANSPOSED
        )
        part_a, part_b = _nibbles(codes, scales, DTYPE)
    else:
        FP8: tl.constexpr = "e4m3" if FORMAT == "fp8_e4m3" else "e5m2" if FORMAT == "fp8_e5m2" else ""
        WIDTH_A: tl.constexpr = DIM if PART_B == 0 else PART_A
        part_a = decoded(_load_tile(rows, columns, in_range, WIDTH_A, PART_A, MASKED, TRANSPOSED), FP8, DTYPE)
        part_b = part_a
        if PART_B > 0:
            rest = tl.arange(0, PART_B)
            tile = _load_tile(rows + PART_A, rest, in_range, DIM - PART_A, PART_B, MASKED, TRANSPOSED)
            part_b = decoded(tile, FP8, DTYPE)
    return part_a, part_b


@triton.jit
def store_parts(
    rows,
    sum_a,
    sum_b,
    share,
    row_exists,
    VALUE_DIM: tl.constexpr,
    VALUE_A: tl.constexpr,
    VALUE_B: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Both parts of the outputs, each row times its `share`, where the pointers `rows` say."""
    dtype: tl.constexpr = rows.dtype.element_ty
    channels = channels_of(VALUE_A, FORMAT, 0, False)
    mask = row_exists[:, None] & (channels < VALUE_DIM)[None, :]
    tl.store(rows[:, None] + channels[None, :], narrowed(sum_a * share[:, None], dtype), mask=mask)
    if VALUE_B > 0:
        channels_b = channels_of(VALUE_B, FORMAT, VALUE_A, True)
        mask_b = row_exists[:, None] & (channels_b < VALUE_DIM)[None, :]
        tl.store(rows[:, None] + channels_b[None, :], narrowed(sum_b * share[:, None], dtype), mask=mask_b)


@triton.jit
def channels_of(PART: tl.constexpr, FORMAT: tl.constexpr, START: tl.constexpr, IS_B: tl.constexpr):
    """Which channels of a head a part holds."""
    if FORMAT == "int4":
        return tl.arange(0, PART) * 2 + (1 if IS_B else 0)
    else:
        return tl.arange(0, PART) + START
