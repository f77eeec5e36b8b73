"""How keys and values lie in the cache: plain floats, or one of the quantised formats with their scales."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

__all__ = ["CacheFormat", "dequantize", "format_of", "int4_groups", "quantize", "scale_shape"]


class CacheFormat(Enum):
    """What one cached element is; the cache's dtype says which.

    FLOAT: the query's own dtype, float64, float32, float16 or bfloat16; no scales
    FP8_E4M3, FP8_E5M2: float8_e4m3fn, float8_e5m2; scales are float32, one for the tensor, (), or one per head, (kv_heads,);
          none means 1. A code c stands for c * scale
    INT8: int8; scales are float32 (blocks, block_size, kv_heads), one per token and head
    INT4: uint8, two channels in a byte, the even one in the low half; scales are bfloat16
          (blocks, block_size, kv_heads, groups, 2), a step and a minimum per group of channels: c * step + minimum
    """

    FLOAT = "float"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"
    INT8 = "int8"
    INT4 = "int4"


_BY_DTYPE = {
    torch.float64: CacheFormat.FLOAT,
    torch.float32: CacheFormat.FLOAT,
    torch.float16: CacheFormat.FLOAT,
    torch.bfloat16: CacheFormat.FLOAT,
    torch.float8_e4m3fn: CacheFormat.FP8_E4M3,
    torch.float8_e5m2: CacheFormat.FP8_E5M2,
    torch.int8: CacheFormat.INT8,
    torch.uint8: CacheFormat.INT4,
}


def format_of(dtype: torch.dtype) -> CacheFormat | None:
    """The format of a cache of `dtype`; None if no cache has it."""
    return _BY_DTYPE.get(dtype)


def int4_groups(head_dim: int) -> int:
    """Groups of channels with a step and a minimum of their own: of 32 channels, or 16 where 32 does not divide.

    A cache may use others: its scales' shape says so.

    >>> int4_groups(128), int4_groups(80), int4_groups(10)
    (4, 5, 1)
    """
    size = next((size for size in (32, 16) if head_dim % size == 0), head_dim)
    return head_dim // size


def scale_shape(
    cache_format: CacheFormat, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, ...] | None:
    """The shape of the scales that a cache needs, per head where there is a choice; None for plain floats.

    >>> scale_shape(CacheFormat.INT4, 8, 16, 2, 128)
    (8, 16, 2, 4, 2)
    """
    if cache_format is CacheFormat.FLOAT:
        return None
    if cache_format in (CacheFormat.FP8_E4M3, CacheFormat.FP8_E5M2):
        return (num_kv_heads,)
    if cache_format is CacheFormat.INT8:
        return (num_blocks, block_size, num_kv_heads)
    return (num_blocks, block_size, num_kv_heads, int4_groups(head_dim), 2)


def dequantize(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that `codes` mean, in `dtype`: (..., kv_heads, head_dim).

    codes: (..., kv_heads, head_dim), or half of head_dim in INT4. scale: as `CacheFormat` says, its leading dimensions
    those of `codes` where it has one per token. O(elements).
    """
    cache_format = _BY_DTYPE[codes.dtype]
    if cache_format is CacheFormat.FLOAT:
        return codes.to(dtype)
    if scale is None:
        return codes.to(dtype)
    scale = scale.to(dtype)
    if cache_format is CacheFormat.INT4:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(dtype)
        group_size = nibbles.shape[-1] // scale.shape[-2]
        grouped = nibbles.view(*nibbles.shape[:-1], scale.shape[-2], group_size)
        return torch.flatten(grouped * scale[..., :1] + scale[..., 1:], -2)
    if scale.ndim == 0:
        return codes.to(dtype) * scale
    return codes.to(dtype) * scale[..., None]


def quantize(values: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Codes for `values` (..., kv_heads, head_dim) in a cache of `dtype`, and their scales where these are per token.

    FP8 divides by `scale` and saturates at the largest finite number, as every engine does: a scale that is too small
    costs accuracy, never a NaN. INT8 chooses scale = max|x| / 127 per token and head. INT4 chooses, per group of
    channels, minimum = min x and step = (max x - min x) / 15, both rounded to bfloat16 so that the codes are made
    with the very numbers that are stored; `scale` then only says, by its shape, how many groups there are.
    """
    cache_format = _BY_DTYPE[dtype]
    if cache_format is CacheFormat.FLOAT:
        return values.to(dtype), None
    x = values.float()
    if cache_format is CacheFormat.INT8:
        step = x.abs().amax(-1) / _beside(x, 127.0)
        codes = torch.round(x / torch.where(step > 0, step, 1.0)[..., None])
        return codes.to(torch.int8), step
    if cache_format is CacheFormat.INT4:
        return _quantize_int4(x, int4_groups(values.shape[-1]) if scale is None else scale.shape[-2])
    if scale is not None:
        x = x / (scale if scale.ndim == 0 else scale[:, None])
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype), None


def _beside(x: Tensor, number: float) -> Tensor:
    # By a number, torch divides on CUDA through the reciprocal, which may differ from the quotient in the last bit.
    return x.new_full((), number)


def _quantize_int4(values: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    # The size is spelled out: torch cannot infer it where there are no values.
    grouped = values.reshape(*values.shape[:-1], num_groups, values.shape[-1] // num_groups)
    minimum = grouped.amin(-1).bfloat16()
    step = ((grouped.amax(-1) - minimum.float()) / _beside(values, 15.0)).bfloat16()
    safe_step = torch.where(step > 0, step.float(), 1.0)[..., None]
    codes = ((grouped - minimum.float()[..., None]) / safe_step).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), torch.stack((step, minimum), dim=-1)
