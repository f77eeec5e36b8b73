"""Attention in calls of torch alone: what runs where there is no compiler and no Triton."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.formats import CacheFormat, format_of, quantize
from pagedkv.attention.key_pieces import Int64s, KeyPieces
from pagedkv.attention.merge import merge_states
from pagedkv.attention.partition import Partition

__all__ = ["TorchBackend"]

# Keys of one chunk, and values of one chunk: each at most this large. Both fit in the last-level cache of a server's
# processor, next to what else is there.
CHUNK_BYTES = 4 << 20
CHUNK_TOKENS = (256, 16384)
# A decode's keys are cut into pieces of this many, several of them in one chunk: where there are few heads, torch has
# pieces to spread over its threads.
PIECE_TOKENS = 1024
# Up to so many rows (query tokens x heads per KV head), all rows of a KV head become one small matrix.
MAX_FOLDED_ROWS = 64
QUERY_TILE = 2048
# Elements of a bias, or of scores made by hand, for a tile of queries and a chunk of keys.
MAX_SCORES = 1 << 22


class TorchBackend:
    """CPU and CUDA, every dtype and feature, in calls of torch alone.

    Keys and values are gathered into a workspace that stays in the processor's cache, and attended there, chunk by
    chunk; the chunks' results are merged by their LSE. On a CPU the arithmetic is
    `aten::_scaled_dot_product_flash_attention_for_cpu`, which returns the LSE too. With a soft-cap, and on CUDA, scores
    are made by hand in float32. float16 and quantised caches are computed in float32.

    Decode, 16 sequences of 4096 tokens, bfloat16, 32 query and 8 KV heads of 128, scattered blocks of 16, torch 2.13 on
    two cores of Zen 4; time of SDPA on contiguous keys and values, with query heads folded into rows, / time of:

    - this, by CPU time on one thread: 0.70 with a quiet neighbour, 0.55 to 0.67 with busy ones. In the quiet run, chunks
      of 1, 2, 8 and 16 MiB: 0.56, 0.67, 0.64 and 0.43
    - rows of one head instead of whole blocks, and a buffer per chunk instead of one workspace: 0.53
    - by wall clock on both cores, quiet: a gather of whole sequences 0.33, of the whole batch 0.15
    - what a view could reach at best, where a sequence's blocks are consecutive and nothing is copied: 0.70. No gain, for
      rows that are 2 KiB apart are attended more slowly from memory than gathered and attended in the cache
    - `bmm` and a softmax by hand: twice as fast in the cache, but its scores are rounded to bfloat16

    32 KV heads, same count of query heads: 0.80. float32: 0.75. float16: 1.8. Prefill of 512 tokens: 0.85, on a prefix of
    3584: 1.0.
    """

    name = "torch"

    def unavailable(self) -> str | None:
        """Never: torch is there if this module is."""
        return None

    def runs_on(self, device_type: str) -> bool:
        """On CPU and CUDA."""
        return device_type in ("cpu", "cuda")

    def refuses(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def refuses_write(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """One task per sequence: tasks are not read, for torch divides the work of each of its calls itself."""
        return Partition(num_workers=1, max_decode_rows=2**30, query_tile=2**30, min_split=2**30)

    def describe(self) -> str:
        """The library it is written in."""
        return f"torch {torch.__version__}, gather and SDPA"

    @torch.no_grad()
    def attend(self, call: AttentionCall) -> None:
        """Decodes with the same number of query tokens together, then the prefills one by one."""
        setup = _Setup.of(call)
        lengths = call.seq_lens.numpy(force=True).astype(np.int64)
        starts = call.query_start_loc.numpy(force=True).astype(np.int64)
        num_queries = np.diff(starts)
        is_folded = num_queries * setup.group <= MAX_FOLDED_ROWS
        for count in np.unique(num_queries[is_folded]).tolist():
            if count:
                seqs = (is_folded & (num_queries == count)).nonzero()[0]
                _attend_folded(call, setup, seqs, starts[seqs], lengths[seqs], count)
        for seq_idx in (~is_folded).nonzero()[0].tolist():
            _attend_prefill(call, setup, seq_idx, int(starts[seq_idx]), int(starts[seq_idx + 1]), int(lengths[seq_idx]))

    @torch.no_grad()
    def write(self, call: WriteCall) -> None:
        """Quantise where the cache is quantised, then one indexed assignment per cache."""
        wanted = call.slot_mapping >= 0
        slots = call.slot_mapping[wanted]
        _write(call.key[wanted], call.key_cache, slots, call.k_scale)
        if call.value is not None and call.value_cache is not None:
            _write(call.value[wanted], call.value_cache, slots, call.v_scale)


@dataclass(frozen=True, slots=True)
class _Setup:
    """What follows from shapes and dtypes.

    dtype:     of queries, keys and values when they are attended; results are added up in `wide_dtype`
    is_manual: scores are made by hand
    is_latent: the values are the first channels of the keys (MLA), so they are read once
    right:     keys seen after one's own position, 0 if causal, -1 for all
    workspace: (2, bytes) for the keys and the values of a chunk
    """

    num_kv_heads: int
    group: int
    value_dim: int
    dtype: torch.dtype
    is_manual: bool
    is_latent: bool
    right: int
    chunk_tokens: int
    workspace: Tensor

    @staticmethod
    def of(call: AttentionCall) -> _Setup:
        keys, values = call.key_cache, call.value_cache
        num_kv_heads = keys.shape[2]
        value_dim = values.shape[3] * (2 if format_of(values.dtype) is CacheFormat.INT4 else 1)
        is_manual = call.softcap > 0 or call.query.device.type != "cpu"
        # torch's CPU kernel is 4.5 times slower in float16 than in float32 where the processor has no float16 arithmetic.
        keeps_dtype = call.query.dtype == torch.float64 or (keys.dtype == torch.bfloat16 and not is_manual)
        dtype = call.query.dtype if keeps_dtype else torch.float32
        token_bytes = num_kv_heads * max(call.query.shape[2], value_dim) * dtype.itemsize
        chunk_tokens = min(max(CHUNK_BYTES // token_bytes, CHUNK_TOKENS[0]), CHUNK_TOKENS[1])
        stored_bytes = num_kv_heads * max(keys.shape[3], values.shape[3]) * keys.dtype.itemsize
        return _Setup(
            num_kv_heads=num_kv_heads,
            group=call.query.shape[1] // num_kv_heads,
            value_dim=value_dim,
            dtype=dtype,
            is_manual=is_manual,
            is_latent=keys.data_ptr() == values.data_ptr()
            and keys.stride() == values.stride()
            and keys.shape[3] >= values.shape[3]
            and call.k_scale is None
            and call.v_scale is None,
            right=0 if call.causal else call.window_right,
            chunk_tokens=chunk_tokens,
            workspace=torch.empty((2, chunk_tokens * stored_bytes), dtype=torch.uint8, device=keys.device),
        )

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of what is added up over chunks."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _attend_folded(
    call: AttentionCall, setup: _Setup, seqs: Int64s, starts: Int64s, lengths: Int64s, num_queries: int
) -> None:
    """Sequences with `num_queries` query tokens each: the rows of a KV head are one matrix for each piece of keys."""
    if setup.group * num_queries == 1 and setup.dtype == torch.bfloat16:
        # One row is no matrix: torch multiplies it in bfloat16 so slowly that converting the keys costs less.
        setup = replace(setup, dtype=torch.float32)
    device = call.query.device
    tokens = torch.from_numpy(starts[:, None] + np.arange(num_queries)).to(device)
    heads = (setup.num_kv_heads, setup.group)
    queries = call.query[tokens].view(*tokens.shape, *heads, -1).permute(0, 2, 3, 1, 4).flatten(2, 3).to(setup.dtype)
    pieces = _cut(call, setup, lengths, num_queries)
    rows = (setup.num_kv_heads, setup.group * num_queries)
    outs = torch.empty((len(pieces.owners), *rows, setup.value_dim), dtype=setup.wide_dtype, device=device)
    lses = torch.empty((len(pieces.owners), *rows), dtype=setup.wide_dtype, device=device)
    for batch in _batches(pieces.sizes, setup.chunk_tokens):
        of = pieces.owners[batch]
        where = torch.from_numpy(batch).to(device)
        keys = _pieces_of(call, seqs[of], pieces.firsts[batch], pieces.sizes[batch])
        bias = _bias(call, setup, keys, starts[of], lengths[of] - num_queries, range(num_queries))
        if bias is not None:
            bias = bias.expand(-1, -1, setup.group, -1, -1).flatten(2, 3)
        out, lse = _attend(call, setup, queries[torch.from_numpy(of).to(device)], _read(call, setup, keys), bias)
        outs[where], lses[where] = out.to(setup.wide_dtype), lse
    out, lse = _merge_pieces(outs, lses, pieces.counts)
    out = out.view(-1, *heads, num_queries, setup.value_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.view(-1, *heads, num_queries).permute(0, 3, 1, 2).flatten(2, 3)
    _store(call, tokens, out, lse)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Keys of several sequences, cut into pieces: per sequence how many; per piece whose, from where, and how long."""

    counts: Int64s
    owners: Int64s
    firsts: Int64s
    sizes: Int64s


def _cut(call: AttentionCall, setup: _Setup, lengths: Int64s, num_queries: int) -> _Cut:
    firsts = np.zeros_like(lengths)
    if call.window_left >= 0:
        firsts = np.clip(lengths - num_queries - call.window_left, 0, lengths)
    block_size = call.key_cache.shape[1]
    size = max(min(PIECE_TOKENS, setup.chunk_tokens) // block_size, 1) * block_size
    counts = -(-(lengths - firsts) // size)
    owners = np.arange(len(lengths)).repeat(counts)
    nth = np.arange(len(owners)) - (counts.cumsum() - counts)[owners]
    firsts = firsts[owners] + nth * size
    return _Cut(counts, owners, firsts, np.minimum(lengths[owners] - firsts, size))


def _batches(sizes: Int64s, chunk_tokens: int) -> Iterator[Int64s]:
    """Pieces of about the same size together, at most `chunk_tokens` with the padding: indices into `sizes`."""
    order = (-sizes).argsort(kind="stable")
    done = 0
    while done < len(order):
        longest = int(sizes[order[done]])
        batch = order[done : done + chunk_tokens // longest]
        # One more call costs about as much as 64 tokens of padding.
        batch = batch[sizes[batch] >= longest - max(longest // 4, 64)]
        yield batch
        done += len(batch)


def _attend_prefill(call: AttentionCall, setup: _Setup, seq_idx: int, start: int, end: int, length: int) -> None:
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
            keys = _pieces_of(call, np.array([seq_idx]), np.array([chunk.start]), np.array([len(chunk)]))
            is_diagonal = chunk == positions and _can_skip_mask(call, setup, len(chunk))
            bias = None
            if not is_diagonal:
                bias = _bias(call, setup, keys, np.array([start]), np.array([before]), queries)
                bias = None if bias is None else bias[0]
            # The heads of a group are one matrix each, and read the same keys: a stride of 0, no copy.
            key, value = (x[0].contiguous()[:, None].expand(-1, setup.group, -1, -1) for x in _read(call, setup, keys))
            part, part_lse = _attend(call, setup, query, (key, value), bias, is_causal=is_diagonal)
            part = part.to(setup.wide_dtype)
            out, lse = (part, part_lse) if chunk.start == 0 else merge_states(out, lse, part, part_lse)
        _store(call, tokens, out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1))


def _prefill_sizes(call: AttentionCall, setup: _Setup) -> tuple[int, int]:
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


def _chunks_seen(call: AttentionCall, setup: _Setup, positions: range, length: int, chunk_size: int) -> Iterator[range]:
    """The keys that queries at `positions` may see, in chunks; one chunk starts where the queries do.

    The diagonal is then a square, which needs no mask in memory.
    """
    first = min(max(positions.start - call.window_left, 0), length) if call.window_left >= 0 else 0
    end = min(max(positions.stop + setup.right, first), length) if setup.right >= 0 else length
    middle = min(max(positions.start, first), end)
    bounds = [*range(first, middle, chunk_size), *range(middle, end, chunk_size), end]
    for chunk_start, chunk_end in itertools.pairwise(bounds):
        yield range(chunk_start, chunk_end)


def _can_skip_mask(call: AttentionCall, setup: _Setup, size: int) -> bool:
    """Whether, on a diagonal of `size`, being causal is all that hides keys and nothing is added to scores."""
    has_bias = call.alibi_slopes is not None or call.tree_mask is not None
    return setup.right == 0 and not 0 <= call.window_left < size - 1 and not setup.is_manual and not has_bias


def _pieces_of(call: AttentionCall, seqs: Int64s, firsts: Int64s, sizes: Int64s) -> KeyPieces:
    return KeyPieces.of(call.block_tables, call.key_cache.shape[1], seqs, firsts, sizes)


def _read(call: AttentionCall, setup: _Setup, keys: KeyPieces) -> tuple[Tensor, Tensor]:
    """Keys and values: (pieces, kv_heads, keys, dim) each."""
    key = keys.read(call.key_cache, call.k_scale, setup.dtype, setup.workspace[0])
    if setup.is_latent:
        return key, key[..., : setup.value_dim] if setup.is_manual else key
    return key, keys.read(call.value_cache, call.v_scale, setup.dtype, setup.workspace[1])


def _bias(
    call: AttentionCall, setup: _Setup, keys: KeyPieces, starts: Int64s, before: Int64s, queries: range
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


def _attend(
    call: AttentionCall,
    setup: _Setup,
    query: Tensor,
    key_and_value: tuple[Tensor, Tensor],
    bias: Tensor | None,
    *,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of matrices (a, b, rows or keys, dim), the bias broadcast to (a, b, rows, keys): out and LSE."""
    key, value = key_and_value
    if bias is not None and call.tree_mask is not None:
        # A branch that nobody follows may never have been written: a NaN there outlives a weight of zero.
        is_unseen = (bias == -torch.inf).all(-2)[..., None]
        key, value = key.masked_fill(is_unseen, 0), value.masked_fill(is_unseen, 0)
    if setup.is_manual:
        return _attend_by_hand(call, query, key, value, bias)
    # The kernel wants one width for all three. More channels of zeros change no score, and are cut off the result.
    width = max(query.shape[3], value.shape[3])
    query, key, value = (
        x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3])) for x in (query, key, value)
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=call.scale
    )
    out = out[..., : setup.value_dim]
    if bias is not None:
        # The kernel says 0 for the LSE of a query that sees nothing.
        is_blind = (bias == -torch.inf).all(-1)
        out, lse = out.masked_fill(is_blind[..., None], 0), lse.masked_fill(is_blind, -torch.inf)
    return out, lse


def _attend_by_hand(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = (query @ key.mT).mul_(call.scale)
    if call.softcap > 0:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if bias is not None:
        scores += bias
    lse = torch.logsumexp(scores, -1)
    # A query that sees nothing has lse = -inf and gets zeros.
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
    return weights @ value, lse


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


def _store(call: AttentionCall, tokens: Tensor | slice, out: Tensor, lse: Tensor) -> None:
    """Count the sinks, then write out (..., q_heads, value_dim) and lse (..., q_heads) of `tokens`."""
    if call.sinks is not None:
        with_sink = torch.logaddexp(lse, call.sinks.to(lse.dtype))
        # A sink may be -inf, as good as none.
        out = out * (lse - with_sink.masked_fill(with_sink == -torch.inf, 0)).exp()[..., None]
        lse = with_sink
    call.out[tokens] = out.to(call.out.dtype)
    if call.lse is not None:
        call.lse[tokens] = lse.to(call.lse.dtype)


def _write(new: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    block_ids, offsets = slots // cache.shape[1], slots % cache.shape[1]
    codes, scales = quantize(new, cache.dtype, scale)
    if cache.dtype.itemsize == 1:
        # fp8 has no indexed assignment on every device.
        cache, codes = cache.view(torch.uint8), codes.contiguous().view(torch.uint8)
    cache[block_ids, offsets] = codes
    if scales is not None and scale is not None:
        scale[block_ids, offsets] = scales
