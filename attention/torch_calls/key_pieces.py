"""Pieces of sequences, read out of the paged cache into one rectangle of keys or values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.attention.formats import CacheFormat, dequantize, format_of

__all__ = ["CacheRows", "Int64s", "KeyPieces"]

Int64s = NDArray[np.int64]

# Longer rows stay apart by heads: one head's keys would lie so far from each other that they share few sets of the
# processor's first cache. 32 heads of 128 in bfloat16, 8 KiB per token: attention then takes 1.9 times as long.
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class KeyPieces:
    """Pieces of sequences as one rectangle; shorter pieces repeat their last key, so that nothing foreign is read.

    firsts, sizes: of each piece, its first position and its number of keys, 1 or more
    blocks:        (pieces, longest) in which block each key lies; where all pieces are of whole blocks, one column per block
    offsets:       (pieces, longest) and where in it; None where all pieces are of whole blocks
    """

    firsts: Int64s
    sizes: Int64s
    blocks: Tensor
    offsets: Tensor | None

    @staticmethod
    def of(block_tables: Tensor, block_size: int, seqs: Int64s, firsts: Int64s, sizes: Int64s) -> KeyPieces:
        """Look up where `sizes` keys of `seqs` from position `firsts` on lie. O(pieces * longest)."""
        device, longest = block_tables.device, int(sizes.max())
        rows = torch.from_numpy(seqs).to(device)[:, None]
        if int(sizes.min()) == longest and not (longest % block_size or np.count_nonzero(firsts % block_size)):
            columns = (firsts // block_size)[:, None] + np.arange(longest // block_size)
            return KeyPieces(firsts, sizes, block_tables[rows, torch.from_numpy(columns).to(device)], None)
        positions = _positions(firsts, sizes)
        columns = positions // block_size
        offsets = torch.from_numpy(positions - columns * block_size).to(device)
        return KeyPieces(firsts, sizes, block_tables[rows, torch.from_numpy(columns).to(device)], offsets)

    @property
    def positions(self) -> Tensor:
        """(pieces, longest) in the sequences. O(pieces * longest)."""
        return torch.from_numpy(_positions(self.firsts, self.sizes)).to(self.blocks.device)

    def read(self, cache: Tensor, scale: Tensor | None, dtype: torch.dtype, workspace: Tensor) -> Tensor:
        """Keys or values as numbers: (pieces, kv_heads, longest, dim), which may lie in `workspace`.

        workspace: bytes, overwritten; as many as the keys take in the cache. O(elements).
        """
        codes = CacheRows.longest_of(cache, self).gather(slice(None), workspace)
        if format_of(cache.dtype) is CacheFormat.FLOAT:
            # Converting costs a pass anyway, which then also brings each head's keys together.
            return codes if codes.dtype == dtype else codes.to(dtype, memory_format=torch.contiguous_format)
        if scale is not None and scale.ndim >= 3:
            scale = scale[self.blocks].flatten(1, 2) if self.offsets is None else scale[self.blocks, self.offsets]
        return dequantize(codes.transpose(1, 2), scale, dtype).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Where pieces lie in one cache: rows of it, and which of them.

    cache: of which `rows` is a view, (many, elements of a row): every row that may start at a slot or head
    index: (pieces, n) of rows that hold all heads of a block or token; (pieces, kv_heads, n) of rows of one head
    """

    cache: Tensor
    rows: Tensor
    index: Tensor

    @staticmethod
    def longest_of(cache: Tensor, pieces: KeyPieces) -> CacheRows:
        """Rows as long as the strides allow: a block, a token, or one head of either.

        Out of memory, on one core, rows of 32 KiB come with 17 GB/s, of 2 KiB with 11, of 256 bytes with 7.5. Indexing
        with blocks and offsets, as the reference does, goes element by element.
        """
        _, block_size, num_heads, dim = cache.shape
        _, to_slot, to_head, _ = cache.stride()
        token_dim = num_heads * dim
        is_whole_token = num_heads == 1 or (to_head == dim and token_dim * cache.dtype.itemsize <= MAX_TOKEN_BYTES)
        width = token_dim if is_whole_token else dim
        is_whole_block = pieces.offsets is None and (block_size == 1 or to_slot == width)
        if is_whole_block:
            width *= block_size
        return CacheRows._of(cache, pieces, width, per_slot=not is_whole_block, per_head=not is_whole_token)

    @staticmethod
    def heads_of(cache: Tensor, pieces: KeyPieces) -> CacheRows:
        """A row for each head of each key: the index is (pieces, kv_heads, longest)."""
        return CacheRows._of(cache, pieces, cache.shape[3], per_slot=True, per_head=True)

    @staticmethod
    def _of(cache: Tensor, pieces: KeyPieces, width: int, *, per_slot: bool, per_head: bool) -> CacheRows:
        # A row may start at any multiple of what divides the strides. The last row ends where the cache ends.
        unit = math.gcd(*cache.stride()[:3]) or 1
        end = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True))
        rows = cache.as_strided(((end - width) // unit + 1, width), (unit, 1))
        to_block, to_slot, to_head, _ = (stride // unit for stride in cache.stride())
        # Half the bytes where they suffice: an index of values has as many entries as there are weights.
        dtype = torch.int32 if len(rows) < 2**31 else torch.int64
        blocks = pieces.blocks.to(dtype) * to_block
        heads = np.arange(cache.shape[2] if per_head else 1)[:, None] * to_head
        if per_slot and pieces.offsets is None:
            inside = _tensor(heads + np.arange(cache.shape[1]) * to_slot, blocks)
            index = (blocks[:, None, :, None] + inside[:, None]).flatten(2)
        else:
            index = blocks if pieces.offsets is None else blocks + pieces.offsets.to(dtype) * to_slot
            index = index[:, None] + _tensor(heads, blocks) if per_head else index[:, None]
        return CacheRows(cache, rows, index if per_head else index[:, 0])

    def gather(self, which: slice, workspace: Tensor) -> Tensor:
        """Some pieces, copied into `workspace`: (pieces, kv_heads, keys, dim), the heads apart or within tokens."""
        _, _, num_heads, dim = self.cache.shape
        index = self.index[which]
        # torch has no index_select of fp8.
        dtype = torch.uint8 if self.cache.dtype.itemsize == 1 else self.cache.dtype
        width = self.rows.shape[1]
        out = workspace[: index.numel() * width * dtype.itemsize].view(dtype).view(-1, width)
        torch.index_select(self.rows.view(dtype), 0, index.flatten(), out=out)
        found = out.view(self.cache.dtype)
        if index.ndim == 2:
            return found.view(len(index), -1, num_heads, dim).transpose(1, 2)
        return found.view(len(index), num_heads, -1, dim)


def _positions(firsts: Int64s, sizes: Int64s) -> Int64s:
    positions: Int64s = firsts[:, None] + np.minimum(np.arange(sizes.max()), sizes[:, None] - 1)
    return positions


def _tensor(numbers: Int64s, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device, like.dtype)
