"""What is added to scores: minus infinity where a query does not see a key, and ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.torch_calls.key_pieces import Int64s, KeyPieces
from pagedkv.attention.torch_calls.setup import Setup

__all__ = ["bias_of"]


def bias_of(
    call: AttentionCall, setup: Setup, keys: KeyPieces, starts: Int64s, before: Int64s, queries: range
) -> Tensor | None:
    """What is added to the scores: (pieces, 1 or kv_heads, 1 or group, queries, keys); None where it is all zeros.

    starts:  of each piece's sequence, its first query token; before: that token's position
    queries: which of a sequence's query tokens are looked at
    """
    left, right = call.window_left, setup.right
    longest = int(keys.sizes.max())
    sees_all = (
        int(keys.sizes.min()) == longest
        and (right < 0 or bool((keys.firsts + keys.sizes <= before + queries.start + right + 1).all()))
        and (left < 0 or bool((keys.firsts >= before + queries.stop - 1 - left).all()))
        and (call.tree_mask is None or bool((keys.firsts + keys.sizes <= before).all()))
    )
    if sees_all and call.alibi_slopes is None:
        return None
    device = call.query.device
    nth_query = torch.arange(queries.start, queries.stop, device=device)
    first_position = torch.from_numpy(before).to(device)
    query_positions = (first_position[:, None] + nth_query)[:, :, None]
    key_positions = keys.positions[:, None, :]
    sizes = torch.from_numpy(keys.sizes).to(device)
    visible = (torch.arange(longest, device=device) < sizes[:, None])[:, None, :].expand(-1, len(queries), -1)
    if right >= 0:
        visible = visible & (key_positions <= query_positions + right)
    if left >= 0:
        visible = visible & (key_positions >= query_positions - left)
    if call.tree_mask is not None:
        words = call.tree_mask[torch.from_numpy(starts).to(device)[:, None] + nth_query]
        visible = visible & _tree_visible(words, key_positions - first_position[:, None, None])
    bias = torch.zeros((1, 1, 1, 1, 1), dtype=setup.wide_dtype, device=device)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(setup.wide_dtype).view(setup.num_kv_heads, setup.group, 1, 1)
        bias = -slopes * (key_positions - query_positions).abs()[:, None, None]
    return torch.where(visible[:, None, None], bias, -torch.inf)


def _tree_visible(words: Tensor, nth: Tensor) -> Tensor:
    """Bit `nth` (pieces, 1, keys) of words (pieces, queries, n); keys before the query tokens have nth < 0."""
    nth = nth.expand(-1, words.shape[1], -1)
    inside = nth.clamp(0, words.shape[2] * 32 - 1)
    bits = words.gather(2, inside // 32) >> (inside % 32)
    return (nth < 0) | (bits & 1).bool()
