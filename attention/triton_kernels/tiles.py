"""How large the kernels' tiles are: plain numbers, chosen by shape, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedkv.attention.call import Features
from pagedkv.attention.formats import CacheFormat

__all__ = ["MAX_HEAD_DIM", "Parts", "Tile", "decode_rows", "key_parts", "prefill_rows", "tile_for", "value_parts"]

# Below 16 rows the tensor cores have no instruction.
MIN_ROWS = 16
# Of wider heads, no tile fits in shared memory.
MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """rows x keys are the scores that a program holds; warps and stages are what Triton takes.

    Triton spends one stage on products and half of the others on block ids: n buffers of keys and values need 2n + 1.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Parts:
    """A head in two powers of two, which hold all of its channels; b is 0 where one is enough."""

    a: int
    b: int


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below.

    >>> [next_power_of_two(n) for n in (1, 16, 80)]
    [1, 16, 128]
    """
    return 1 << (number - 1).bit_length()


def key_parts(head_dim: int, cache_format: CacheFormat) -> Parts:
    """A head of keys. Two exact parts where there are any: padding costs products, and 1024 channels too much memory.

    >>> key_parts(576, CacheFormat.FLOAT), key_parts(80, CacheFormat.FLOAT), key_parts(112, CacheFormat.FLOAT)
    (Parts(a=512, b=64), Parts(a=64, b=16), Parts(a=128, b=0))
    """
    if cache_format is CacheFormat.INT4:
        half = max(MIN_ROWS, next_power_of_two(head_dim // 2))
        return Parts(half, half)
    padded = max(MIN_ROWS, next_power_of_two(head_dim))
    rest = head_dim - padded // 2
    if padded // 2 >= MIN_ROWS and padded != head_dim:
        rest_padded = max(MIN_ROWS, next_power_of_two(rest))
        if rest_padded <= padded // 4:
            return Parts(padded // 2, rest_padded)
    return Parts(padded, 0)


def value_parts(value_dim: int, cache_format: CacheFormat) -> Parts:
    """A head of values: the same rule.

    >>> value_parts(192, CacheFormat.FLOAT), value_parts(128, CacheFormat.INT4)
    (Parts(a=128, b=64), Parts(a=64, b=64))
    """
    return key_parts(value_dim, cache_format)


def decode_rows(group: int) -> int:
    """Query rows up to which a sequence is a decode: one tile, or for 128 heads per KV head the rows of one token.

    >>> [decode_rows(group) for group in (1, 4, 16, 20, 128)]
    [16, 16, 16, 32, 128]
    """
    return max(MIN_ROWS, next_power_of_two(group))


def prefill_rows(group: int) -> int:
    """Rows of a prefill task: 128, but at least one query token.

    >>> [prefill_rows(group) for group in (1, 4, 12, 200)]
    [128, 128, 120, 200]
    """
    return max(128 // group, 1) * group


def tile_for(features: Features, *, is_decode: bool, is_interpreted: bool) -> Tile:
    """The tile for a call. `benchmarks/gpu_check.py --sweep` prints which one is the fastest on a GPU.

    Chosen so that the keys and values in flight fill the latency of memory (about 40 KiB per multiprocessor: 4.8 TB/s of an
    H200 for 1 us, over 132 of them) and two programs fit one multiprocessor's shared memory.
    """
    if is_interpreted:
        # Small tiles: tests see many of them in few keys.
        return Tile(rows=MIN_ROWS if is_decode else 32, keys=16, num_warps=4, num_stages=1)
    width = max(features.head_dim, features.value_dim)
    if features.dtype == torch.float32:
        # No tensor core takes float32 whole: what limits are the registers of plain multiplications.
        return Tile(MIN_ROWS if is_decode or width > 256 else 32, 16, 4 if width > 256 else 8, 3)
    if width > 256:
        # A row's sums are 512 wide: 64 rows of them are half of a multiprocessor's registers. Of wider rows, such as those of
        # int4, which is padded from 576 to 1024, no more than 32 fit in its shared memory.
        parts = [key_parts(dim, features.cache_format) for dim in (features.head_dim, features.value_dim)]
        most = 64 if max(part.a + part.b for part in parts) <= 576 else 32
        rows = min(decode_rows(features.num_q_heads // features.num_kv_heads), most) if is_decode else most
        return Tile(rows, 32, 8 if rows == 64 or most == 32 else 4, 3)
    if is_decode:
        rows = min(decode_rows(features.num_q_heads // features.num_kv_heads), 64)
        return Tile(rows, _decode_keys(width, features.cache_format), 4, 5)
    if width > 128:
        return Tile(128, 64, 8, 3)
    return Tile(128, 128 if width <= 64 else 64, 8, 5)


def _decode_keys(width: int, cache_format: CacheFormat) -> int:
    """About 16 KiB of keys; int4 has twice as many numbers in a byte, and needs the registers."""
    if cache_format in (CacheFormat.FLOAT, CacheFormat.INT4):
        return 64 if width <= 128 else 32
    return 128 if width <= 128 else 64
