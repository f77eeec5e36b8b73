"""Pieces of sequences, read out of the paged cache into one rectangle of keys or values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.attention.formats import CacheFormat, dequantize, format_of

__all__ = ["Int64s", "KeyPieces"]

Int64s = NDArray[np.int64]

# Longer rows stay apart by heads: one head's keys would lie so far from each other that they share few sets of the
# processor's first cache. 32 heads of 128 in bfloat16, 8 KiB per token: attention then takes 1.9 times as long.
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class KeyPieces:
    """Pieces of sequences as one rectangle; shorter pieces repeat their last key, so that nothing foreign is read.

    firsts, sizes: of each piece, its first position and its number of keys, 1 or more
    positions:     (pieces, longest) of the keys
    blocks:        (pieces, longest) in which block each key lies; where all pieces are of whole blocks, one column per block
    offsets:       (pieces, longest) and where in it; None where all pieces are of whole blocks
    """

    firsts: Int64s
    sizes: Int64s
    positions: Tensor
    blocks: Tensor
    offsets: Tensor | None

    @staticmethod
    def of(block_tables: Tensor, block_size: int, seqs: Int64s, firsts: Int64s, sizes: Int64s) -> KeyPieces:
        """Look up where `sizes` keys of `seqs` from position `firsts` on lie. O(pieces * longest)."""
        device = block_tables.device
        nth = np.minimum(np.arange(sizes.max()), sizes[:, None] - 1)
        positions = torch.from_numpy(firsts[:, None] + nth).to(device)
        rows = torch.from_numpy(seqs).to(device)[:, None]
        if (sizes == sizes[0]).all() and not (sizes[0] % block_size or (firsts % block_size).any()):
            columns = positions[:, ::block_size] // block_size
            return KeyPieces(firsts, sizes, positions, block_tables[rows, columns].long(), None)
        columns = positions // block_size
        offsets = positions - columns * block_size
        return KeyPieces(firsts, sizes, positions, block_tables[rows, columns].long(), offsets)

    def read(self, cache: Tensor, scale: Tensor | None, dtype: torch.dtype, workspace: Tensor) -> Tensor:
        """Keys or values as numbers: (pieces, kv_heads, longest, dim), which may lie in `workspace`.

        workspace: bytes, overwritten; as many as the keys take in the cache. O(elements).
        """
        codes = _gather(cache, self.blocks, self.offsets, workspace)
        if format_of(cache.dtype) is CacheFormat.FLOAT:
            # Converting costs a pass anyway, which then also brings each head's keys together.
            return codes if codes.dtype == dtype else codes.to(dtype, memory_format=torch.contiguous_format)
        if scale is not None and scale.ndim >= 3:
            scale = scale[self.blocks].flatten(1, 2) if self.offsets is None else scale[self.blocks, self.offsets]
        return dequantize(codes.transpose(1, 2), scale, dtype).transpose(1, 2)


def _gather(cache: Tensor, blocks: Tensor, offsets: Tensor | None, workspace: Tensor) -> Tensor:
    """What lies at (pieces, n) blocks and offsets, or all of (pieces, n) blocks: (pieces, kv_heads, keys, dim).

    One `index_select` of rows as long as the strides allow: a block, a token, or one head of either. Out of memory,
    on one core, rows of 32 KiB come with 17 GB/s, of 2 KiB with 11, of 256 bytes with 7.5. Indexing with blocks and
    offsets, as the reference does, goes element by element.
    """
    _, block_size, num_heads, dim = cache.shape
    to_block, to_slot, to_head, _ = cache.stride()
    token_dim = num_heads * dim
    is_whole_token = num_heads == 1 or (to_head == dim and token_dim * cache.dtype.itemsize <= MAX_TOKEN_BYTES)
    width = token_dim if is_whole_token else dim
    if offsets is None:
        if block_size == 1 or to_slot == width:
            width *= block_size
        else:
            offsets = torch.arange(block_size, device=cache.device).repeat(blocks.shape[1])
            blocks = blocks.repeat_interleave(block_size, 1)
    # A row may start at any multiple of what divides the strides. The last row ends where the cache ends.
    unit = math.gcd(to_block, to_slot, to_head) or 1
    index = blocks * (to_block // unit)
    if offsets is not None:
        index = index + offsets * (to_slot // unit)
    if not is_whole_token:
        index = index[:, None] + (torch.arange(num_heads, device=cache.device) * (to_head // unit))[:, None]
    end = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True))
    rows = cache.as_strided(((end - width) // unit + 1, width), (unit, 1))
    # torch has no index_select of fp8.
    dtype = torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype
    out = workspace[: index.numel() * width * cache.dtype.itemsize].view(dtype).view(-1, width)
    torch.index_select(rows.view(dtype), 0, index.flatten(), out=out)
    found = out.view(cache.dtype)
    if is_whole_token:
        return found.view(len(blocks), -1, num_heads, dim).transpose(1, 2)
    return found.view(len(blocks), num_heads, -1, dim)
