"""Sequences of few query tokens: the rows of a KV head are one matrix, and the keys of all sequences are cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.torch_calls.bags import BAG_TOKENS, MAX_SCORES, attend_in_bags, can_use_bags
from pagedkv.attention.torch_calls.key_pieces import Int64s, KeyPieces
from pagedkv.attention.torch_calls.masks import bias_of
from pagedkv.attention.torch_calls.products import attend
from pagedkv.attention.torch_calls.results import store
from pagedkv.attention.torch_calls.setup import Setup, pieces_of, read

__all__ = ["attend_folded"]

# A decode's keys are cut into pieces of this many, several of them in one chunk: where there are few heads, torch has
# pieces to spread over its threads.
PIECE_TOKENS = 1024


def attend_folded(
    call: AttentionCall, setup: Setup, seqs: Int64s, starts: Int64s, lengths: Int64s, num_queries: int
) -> None:
    """Sequences with `num_queries` query tokens each: the rows of a KV head are one matrix for each piece of keys."""
    device = call.query.device
    tokens = torch.from_numpy(starts[:, None] + np.arange(num_queries)).to(device)
    heads, num_rows = (setup.num_kv_heads, setup.group), setup.group * num_queries
    queries = call.query[tokens].view(*tokens.shape, *heads, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    way, piece_tokens, batch_tokens = _attend_gathered, PIECE_TOKENS, setup.chunk_tokens
    if can_use_bags(call, num_rows):
        way, piece_tokens, batch_tokens = attend_in_bags, BAG_TOKENS, MAX_SCORES // (setup.num_kv_heads * num_rows)
    pieces = _cut(call, min(piece_tokens, setup.chunk_tokens), lengths, num_queries)
    shape = (0, setup.num_kv_heads, num_rows)
    # All that there is where no sequence has keys; it also widens what is put behind it.
    nothing = torch.empty((*shape, setup.value_dim), dtype=setup.wide_dtype, device=device)
    outs, lses, order = [nothing], [nothing.new_empty(shape)], [np.empty(0, np.int64)]
    for batch in batches(pieces.sizes, batch_tokens, pieces.whole):
        of = pieces.owners[batch]
        keys = pieces_of(call, seqs[of], pieces.firsts[batch], pieces.sizes[batch])
        bias = bias_of(call, setup, keys, starts[of], lengths[of] - num_queries, range(num_queries))
        if bias is not None:
            bias = bias.expand(-1, -1, setup.group, -1, -1).flatten(2, 3)
        out, lse = way(call, setup, queries[torch.from_numpy(of).to(device)], keys, bias)
        outs.append(out)
        lses.append(lse)
        order.append(batch)
    place = torch.from_numpy(np.concatenate(order).argsort()).to(device)
    out, lse = _merge_pieces(torch.cat(outs)[place], torch.cat(lses)[place], pieces.counts)
    out = out.view(-1, *heads, num_queries, setup.value_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.view(-1, *heads, num_queries).permute(0, 3, 1, 2).flatten(2, 3)
    store(call, tokens, out, lse)


def _attend_gathered(
    call: AttentionCall, setup: Setup, query: Tensor, keys: KeyPieces, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if query.shape[2] == 1 and setup.dtype == torch.bfloat16:
        # One row is no matrix: torch multiplies it in bfloat16 so slowly that converting the keys costs less.
        setup = replace(setup, dtype=torch.float32)
    return attend(call, setup, query.to(setup.dtype), read(call, setup, keys), bias)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Keys of several sequences, cut into pieces: per sequence how many; per piece whose, from where, and how long.

    whole: the length of all pieces but the last of a sequence
    """

    counts: Int64s
    owners: Int64s
    firsts: Int64s
    sizes: Int64s
    whole: int


def _cut(call: AttentionCall, piece_tokens: int, lengths: Int64s, num_queries: int) -> _Cut:
    firsts = np.zeros_like(lengths)
    if call.window_left >= 0:
        firsts = np.clip(lengths - num_queries - call.window_left, 0, lengths)
    block_size = call.key_cache.shape[1]
    size = max(piece_tokens // block_size, 1) * block_size
    counts = -(-(lengths - firsts) // size)
    owners = np.arange(len(lengths)).repeat(counts)
    nth = np.arange(len(owners)) - (counts.cumsum() - counts)[owners]
    firsts = firsts[owners] + nth * size
    return _Cut(counts, owners, firsts, np.minimum(lengths[owners] - firsts, size), size)


def batches(sizes: Int64s, batch_tokens: int, whole: int) -> Iterator[Int64s]:
    """Pieces of about the same size together, at most `batch_tokens` with the padding: indices into `sizes`.

    Those of `whole` tokens are by themselves: whole blocks are read faster than tokens.
    """
    order = (-sizes).argsort(kind="stable")
    done = 0
    while done < len(order):
        longest = int(sizes[order[done]])
        batch = order[done : done + max(batch_tokens // longest, 1)]
        # One more call costs about as much as 64 tokens of padding.
        shortest = whole if longest == whole else longest - max(longest // 4, 64)
        batch = batch[sizes[batch] >= shortest]
        yield batch
        done += len(batch)


def _merge_pieces(outs: Tensor, lses: Tensor, counts: Int64s) -> tuple[Tensor, Tensor]:
    """One result per sequence from its pieces', which stand one after the other. Overwrites `outs`.

    `segment_reduce` adds in the same order every time, which `index_add` on CUDA does not.
    """
    if (counts == 1).all():
        return outs, lses
    lengths = torch.from_numpy(counts).to(outs.device)
    highest = torch.segment_reduce(lses, "max", lengths=lengths, initial=-torch.inf)
    highest.masked_fill_(highest == -torch.inf, 0)
    weights = torch.exp(lses - highest.repeat_interleave(lengths, 0))
    total = torch.segment_reduce(weights, "sum", lengths=lengths, initial=0)
    out = torch.segment_reduce(outs.mul_(weights[..., None]), "sum", lengths=lengths, initial=0)
    return out.div_(total.masked_fill(total == 0, 1)[..., None]), highest + total.log()
