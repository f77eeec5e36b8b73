"""Sequences of many query tokens, one by one, in tiles of queries and chunks of keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.merge import merge_states
from pagedkv.attention.torch_calls.masks import bias_of
from pagedkv.attention.torch_calls.products import attend
from pagedkv.attention.torch_calls.results import store
from pagedkv.attention.torch_calls.setup import Setup, pieces_of, read

__all__ = ["attend_prefill"]

QUERY_TILE = 2048
# Elements of a bias, or of scores made by hand, for a tile of queries and a chunk of keys.
MAX_SCORES = 1 << 22


def attend_prefill(call: AttentionCall, setup: Setup, seq_idx: int, start: int, end: int, length: int) -> None:
    """One sequence with many query tokens, tile by tile: first the keys before a tile, then those on its diagonal."""
    tile_size, chunk_size = _prefill_sizes(call, setup)
    before = length - (end - start)
    for first in range(0, end - start, tile_size):
        queries = range(first, min(first + tile_size, end - start))
        positions = range(before + first, before + queries.stop)
        tokens = slice(start + first, start + queries.stop)
        query = call.query[tokens].reshape(len(queries), setup.num_kv_heads, setup.group, -1)
        query = query.permute(1, 2, 0, 3).to(setup.dtype)
        shape = query.shape[:3]
        out = torch.zeros((*shape, setup.value_dim), dtype=setup.wide_dtype, device=query.device)
        lse = torch.full(shape, -torch.inf, dtype=setup.wide_dtype, device=query.device)
        for chunk in _chunks_seen(call, setup, positions, length, chunk_size):
            keys = pieces_of(call, np.array([seq_idx]), np.array([chunk.start]), np.array([len(chunk)]))
            is_diagonal = chunk == positions and _can_skip_mask(call, setup, len(chunk))
            bias = None
            if not is_diagonal:
                bias = bias_of(call, setup, keys, np.array([start]), np.array([before]), queries)
                bias = None if bias is None else bias[0]
            # The heads of a group are one matrix each, and read the same keys: a stride of 0, no copy.
            key, value = (x[0].contiguous()[:, None].expand(-1, setup.group, -1, -1) for x in read(call, setup, keys))
            part, part_lse = attend(call, setup, query, (key, value), bias, is_causal=is_diagonal)
            part = part.to(setup.wide_dtype)
            out, lse = (part, part_lse) if chunk.start == 0 else merge_states(out, lse, part, part_lse)
        store(call, tokens, out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1))


def _prefill_sizes(call: AttentionCall, setup: Setup) -> tuple[int, int]:
    """Query tokens of a tile, and keys of a chunk."""
    chunk_size = setup.chunk_tokens
    tile_size = min(QUERY_TILE, chunk_size)
    if call.window_left >= 0:
        # A tile reads its own length of keys and the window's, and the window's are read again for the next tile.
        tile_size = min(max(call.window_left + 1, 128), tile_size)
    if setup.is_manual or call.alibi_slopes is not None:
        chunk_size = min(chunk_size, 1024)
        tile_size = min(tile_size, max(MAX_SCORES // (call.query.shape[1] * chunk_size), 16))
    return tile_size, chunk_size


def _chunks_seen(call: AttentionCall, setup: Setup, positions: range, length: int, chunk_size: int) -> Iterator[range]:
    """The keys that queries at `positions` may see, in chunks; one chunk starts where the queries do.

    The diagonal is then a square, which needs no mask in memory.
    """
    first = min(max(positions.start - call.window_left, 0), length) if call.window_left >= 0 else 0
    end = min(max(positions.stop + setup.right, first), length) if setup.right >= 0 else length
    middle = min(max(positions.start, first), end)
    bounds = [*range(first, middle, chunk_size), *range(middle, end, chunk_size), end]
    for chunk_start, chunk_end in itertools.pairwise(bounds):
        yield range(chunk_start, chunk_end)


def _can_skip_mask(call: AttentionCall, setup: Setup, size: int) -> bool:
    """Whether, on a diagonal of `size`, being causal is all that hides keys and nothing is added to scores."""
    has_bias = call.alibi_slopes is not None or call.tree_mask is not None
    return setup.right == 0 and not 0 <= call.window_left < size - 1 and not setup.is_manual and not has_bias
