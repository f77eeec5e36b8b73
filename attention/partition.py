"""How a ragged batch is cut into tasks of about equal length, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Int32s", "Partition", "PlanCounts", "make_plan"]

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Partition:
    """How finely a backend wants the work cut.

    num_workers:      tasks that run at the same time, for all heads together
    max_decode_rows:  a sequence with at most this many query rows (query tokens x heads per KV head) is a decode
    query_tile:       query tokens of one prefill task
    min_split:        keys that a task reads at least before its keys are split; a multiple of it is a split's length
    tasks_per_worker: how many tasks a worker should get, so that ragged ends even out
    prefill_units:    workers that share a prefill task, each a part of its heads: its splits may be that many times as long
    shares_prefixes:  whether a task may hold query tokens of several sequences
    """

    num_workers: int
    max_decode_rows: int
    query_tile: int
    min_split: int
    tasks_per_worker: int = 4
    prefill_units: int = 1
    shares_prefixes: bool = False


@dataclass(frozen=True, slots=True)
class PlanCounts:
    """The sizes that a launch needs to know on the host."""

    num_decode_tasks: int
    num_prefill_tasks: int
    num_merges: int
    num_partial_tokens: int

    def as_list(self) -> list[int]:
        """The four in order, as an operator of torch takes them."""
        return [self.num_decode_tasks, self.num_prefill_tasks, self.num_merges, self.num_partial_tokens]


def make_plan(
    seq_lens: Int32s,
    query_start_loc: Int32s,
    partition: Partition,
    *,
    heads_per_kv_head: int,
    causal: bool,
    window: tuple[int, int],
    fixed_size: bool = False,
) -> tuple[Int32s, Int32s, PlanCounts]:
    """Cut a ragged batch into tasks of about equal length.

    Keys of all sequences are cut into splits of one common length, chosen so that there are about
    num_workers * tasks_per_worker of them: a sequence of ten times the length gets ten times the splits. At most
    that many tasks plus one per sequence and query tile come out; with `fixed_size` exactly that many, the rest of them
    empty, whatever the lengths are. O(num_seqs + num_tasks), in numpy.
    """
    max_decode_queries = partition.max_decode_rows // heads_per_kv_head
    tiles, num_decode_tiles = _tiles(
        seq_lens, query_start_loc, max_decode_queries, partition.query_tile, causal, window
    )
    tasks, merges, num_decode_tasks, num_partial_tokens = _split(tiles, num_decode_tiles, partition)
    if fixed_size:
        num_spare = partition.num_workers * partition.tasks_per_worker
        num_prefill_tiles = tiles.shape[1] - num_decode_tiles
        num_tokens = tiles[2] - tiles[1]
        most_decodes = num_decode_tiles + num_spare
        most_prefills = num_prefill_tiles + num_spare if num_prefill_tiles else 0
        decodes = _padded(tasks[:, :num_decode_tasks], most_decodes)
        prefills = _padded(tasks[:, num_decode_tasks:], most_prefills)
        tasks, merges = np.concatenate((decodes, prefills), axis=1), _padded(merges, tiles.shape[1])
        num_decode_tasks = most_decodes
        num_partial_tokens = most_decodes * int(num_tokens[:num_decode_tiles].max(initial=0))
        num_partial_tokens += most_prefills * int(num_tokens[num_decode_tiles:].max(initial=0))
    counts = PlanCounts(num_decode_tasks, tasks.shape[1] - num_decode_tasks, merges.shape[1], num_partial_tokens)
    return tasks, merges, counts


def _padded(columns: Int32s, width: int) -> Int32s:
    """Zeros behind the last column: a task or a merge of no query tokens."""
    padded = np.zeros((len(columns), width), np.int32)
    padded[:, : columns.shape[1]] = columns
    return padded


def _tiles(
    seq_lens: Int32s,
    query_start_loc: Int32s,
    max_decode_queries: int,
    query_tile: int,
    causal: bool,
    window: tuple[int, int],
) -> tuple[Int32s, int]:
    """Query tiles, decodes first, and the keys that any of their tokens may see; and how many are decodes.

    A tile is a column: seq, first, end, first key, end key, and -1, as of a task that writes straight to `out`.
    """
    starts, ends = query_start_loc[:-1], query_start_loc[1:]
    # numpy.diff takes three times as long, which counts here: a plan is some thirty short calls of numpy.
    num_queries = ends - starts
    num_decodes = len(num_queries)
    tiles = np.zeros((6, num_decodes), np.int32)
    tiles[0] = np.arange(num_decodes)
    tiles[1] = starts
    tiles[2] = ends
    tiles[4] = seq_lens
    left, right = window
    if num_decodes and not (
        num_queries[num_queries.argmin()] > 0 and num_queries[num_queries.argmax()] <= max_decode_queries
    ):
        tiles, num_decodes = _with_prefills(tiles, num_queries, max_decode_queries, query_tile)
    if causal:
        # The last token of a tile sees the most: of a decode, which is one tile, all keys.
        right = 0 if tiles.shape[1] > num_decodes else -1
    if left >= 0 or right >= 0:
        _see(tiles, (seq_lens - ends).take(tiles[0]), left, right)
    tiles[5] = -1
    return tiles, num_decodes


def _with_prefills(
    sequences: Int32s, num_queries: Int32s, max_decode_queries: int, query_tile: int
) -> tuple[Int32s, int]:
    """Columns of sequences made columns of tiles: those that are decodes, then prefills cut by query tokens."""
    is_prefill = num_queries > max_decode_queries
    prefills = is_prefill.nonzero()[0]
    # Those with query tokens that are no prefills, which all have some.
    decodes = ((num_queries > 0) ^ is_prefill).nonzero()[0]
    num_tiles = (num_queries.take(prefills) + (query_tile - 1)) // query_tile
    tiles = sequences.take(np.concatenate((decodes, prefills.repeat(num_tiles))), axis=1)
    firsts, ends = tiles[1, len(decodes) :], tiles[2, len(decodes) :]
    # How many tiles of the same sequence come before each.
    places = np.arange(len(firsts))
    places -= (np.add.accumulate(num_tiles) - num_tiles).repeat(num_tiles)
    places *= query_tile
    np.add(firsts, places, out=firsts, casting="unsafe")
    np.minimum(firsts + query_tile, ends, out=ends)
    return tiles, len(decodes)


def _see(tiles: Int32s, offset: Int32s, left: int, right: int) -> None:
    """Put the first and the end key that a tile sees into rows 3 and 4, which hold 0 and the length.

    offset:      of each tile, what is added to a token's index in the batch to have its position. Bottom-right alignment:
                 the last query token of a sequence stands at its last position
    left, right: keys seen before and after one's own position, -1 for all
    """
    num_keys = tiles[4]
    if right >= 0:
        end_keys = tiles[2] + offset
        if right:
            end_keys += right
        np.minimum(np.maximum(end_keys, 0, out=end_keys), num_keys, out=num_keys)
    if left >= 0:
        first_keys = tiles[1] + (offset - left)
        np.minimum(np.maximum(first_keys, 0, out=first_keys), num_keys, out=tiles[3])


def _split(tiles: Int32s, num_decode_tiles: int, partition: Partition) -> tuple[Int32s, Int32s, int, int]:
    """Cut the keys of tiles into tasks: these, the merges they need, how many are decodes, and the partial tokens."""
    # Below zero, so that the longest sort first.
    minus_keys = np.subtract(tiles[3], tiles[4], dtype=np.int64)
    target = partition.num_workers * partition.tasks_per_worker
    granules = -(int(np.add.reduce(minus_keys)) // (target * partition.min_split))
    length = max(granules, 1) * partition.min_split
    prefill_length = length * partition.prefill_units
    if _are_within(minus_keys[:num_decode_tiles], length) and _are_within(
        minus_keys[num_decode_tiles:], prefill_length
    ):
        order = _longest_first(minus_keys, num_decode_tiles)
        return tiles.take(order, axis=1), np.empty((4, 0), np.int32), num_decode_tiles, 0
    longest = np.full(len(minus_keys), length)
    longest[num_decode_tiles:] = prefill_length
    num_splits = np.maximum(-(minus_keys // longest), 1)
    is_split = num_splits > 1
    ends = num_splits.cumsum()
    firsts = ends - num_splits
    num_tokens = tiles[2] - tiles[1]
    # What each task of a tile has more than the one before it: `longest` keys, and so many partial results.
    num_partials = num_tokens * is_split
    sizes = num_partials * num_splits
    partial_ends = sizes.cumsum()
    partial_starts = partial_ends - sizes
    # A tile's first task is its nth of all tasks: `nth * step` is taken off here and comes back below, for all at once.
    origins = np.empty((8, len(num_splits)), np.int64)
    origins[:5] = tiles[:5]
    origins[3] -= firsts * longest
    origins[5] = np.where(is_split, partial_starts - firsts * num_partials, -1)
    origins[6] = num_partials
    origins[7] = longest
    num_tasks = int(ends[-1])
    wide_tasks = origins.repeat(num_splits, axis=1)
    nth = np.arange(num_tasks)
    wide_tasks[3] += nth * wide_tasks[7]
    np.minimum(wide_tasks[3] + wide_tasks[7], wide_tasks[4], out=wide_tasks[4])
    wide_tasks[5] += nth * wide_tasks[6]
    split_tiles = is_split.nonzero()[0]
    merges = np.empty((4, len(split_tiles)), np.int32)
    merges[:2] = tiles[1:3].take(split_tiles, axis=1)
    merges[2] = partial_starts.take(split_tiles)
    merges[3] = num_splits.take(split_tiles)
    num_decode_tasks = int(firsts[num_decode_tiles]) if num_decode_tiles < len(firsts) else num_tasks
    return wide_tasks[:6].astype(np.int32), merges, num_decode_tasks, int(partial_ends[-1])


def _are_within(minus_keys: Int64s, length: int) -> bool:
    """Whether nobody has more than `length` keys. O(n)."""
    # argmin is a fifth of min here.
    return not len(minus_keys) or bool(minus_keys[minus_keys.argmin()] >= -length)


def _longest_first(minus_keys: Int64s, num_decode_tiles: int) -> Int64s:
    """The order of tiles by falling length, decodes before prefills, of equal ones the first first. Overwrites the lengths."""
    # Length and index in one number: numbers sort in a third of the time of a stable argsort, and none are equal.
    ranks = minus_keys
    ranks <<= 31
    ranks += np.arange(len(ranks))
    ranks[:num_decode_tiles].sort()
    if num_decode_tiles < len(ranks):
        ranks[num_decode_tiles:].sort()
    ranks &= 2**31 - 1
    return ranks
