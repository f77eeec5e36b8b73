"""Values that are added up where they lie: `embedding_bag` over rows of the cache, a bag for each query row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.formats import CacheFormat, format_of
from pagedkv.attention.torch_calls.key_pieces import CacheRows, KeyPieces
from pagedkv.attention.torch_calls.products import weights_of
from pagedkv.attention.torch_calls.setup import Setup

__all__ = ["BAG_TOKENS", "MAX_SCORES", "attend_in_bags", "can_use_bags"]

# Keys of a bag, a power of two. The rows of a KV head read its values one after the other, all but the first from the
# nearest caches.
BAG_TOKENS = 512
# Each row of a KV head reads the values again, where a product of matrices would read them once for all.
MAX_ROWS = 8
# Keys that are gathered at once for each thread: in the cache's dtype, and again in the dtype of the scores.
KEY_BYTES = 1 << 20
# Scores of one softmax and one call of `embedding_bag`.
MAX_SCORES = 1 << 19


def can_use_bags(call: AttentionCall, num_rows: int) -> bool:
    """Whether this is the faster way for KV heads of `num_rows` rows, and possible.

    A tree's branch that nobody follows may hold NaN, which a weight of zero would not keep out.
    """
    is_float = format_of(call.value_cache.dtype) is CacheFormat.FLOAT
    return is_float and num_rows <= MAX_ROWS and call.query.device.type == "cpu" and call.tree_mask is None


def attend_in_bags(
    call: AttentionCall, setup: Setup, query: Tensor, keys: KeyPieces, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of matrices (pieces, kv_heads, rows, dim), the bias broadcast to (…, rows, keys): out and LSE."""
    scores = _scores(call, setup, query.to(setup.wide_dtype) * call.scale, keys)
    weights, total, lse = weights_of(call, scores, bias)
    of = CacheRows.heads_of(call.value_cache, keys)
    index = of.index[:, :, None].expand_as(weights).reshape(-1, weights.shape[-1])
    if of.rows.dtype == torch.float16:
        # A sum of as many values must not overflow.
        weights, total = weights.div_(BAG_TOKENS), total.div_(BAG_TOKENS)
    out = embedding_bag(index, of.rows, mode="sum", per_sample_weights=weights.view_as(index).to(of.rows.dtype))
    return out.view(*lse.shape, -1) / total, lse


def _scores(call: AttentionCall, setup: Setup, query: Tensor, keys: KeyPieces) -> Tensor:
    """(pieces, kv_heads, rows, keys): products with keys that are gathered and widened, as many as stay in the cache."""
    num_pieces, num_heads, num_rows, dim = query.shape
    longest = int(keys.sizes.max())
    piece_bytes = longest * num_heads * dim * call.key_cache.dtype.itemsize
    num_at_once = max(min(KEY_BYTES * torch.get_num_threads(), setup.workspace.shape[1]) // piece_bytes, 1)
    of = CacheRows.longest_of(call.key_cache, keys)
    wide = torch.empty((min(num_at_once, num_pieces), num_heads, longest, dim), dtype=query.dtype)
    scores = torch.empty((num_pieces, num_heads, num_rows, longest), dtype=query.dtype)
    # One batch dimension each.
    queries, by_head, results = query.flatten(0, 1), wide.flatten(0, 1).mT, scores.flatten(0, 1)
    for first in range(0, num_pieces, num_at_once):
        part = slice(first, first + num_at_once)
        found = of.gather(part, setup.workspace[0])
        wide[: len(found)].copy_(found)
        part = slice(first * num_heads, (first + len(found)) * num_heads)
        torch.bmm(queries[part], by_head[: len(found) * num_heads], out=results[part])
    return scores
