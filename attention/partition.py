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
    """

    num_workers: int
    max_decode_rows: int
    query_tile: int
    min_split: int
    tasks_per_worker: int = 4


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
    # numpy.diff takes three times as long, which counts here.
    num_queries = query_start_loc[1:] - query_start_loc[:-1]
    num_rows = num_queries * heads_per_kv_head
    is_decode = num_rows <= partition.max_decode_rows
    if num_queries.all():
        decode_idx = None if is_decode.all() else is_decode.nonzero()[0]
    else:
        decode_idx = (is_decode & (num_queries > 0)).nonzero()[0]
    batch = (query_start_loc[:-1], num_queries, seq_lens)
    tiles = _tiles(batch, decode_idx, None, causal, window)
    num_decode_tiles = tiles.shape[1]
    if decode_idx is not None and not is_decode.all():
        prefill_tiles = _tiles(batch, (~is_decode).nonzero()[0], partition.query_tile, causal, window)
        tiles = np.concatenate((tiles, prefill_tiles), axis=1)
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
    batch: tuple[Int32s, Int32s, Int32s],
    seqs: Int64s | None,
    query_tile: int | None,
    causal: bool,
    window: tuple[int, int],
) -> Int32s:
    """Query tiles, and the keys that any of their tokens may see: (5, n) seq, first, end, first key, end key.

    batch: first query token, number of query tokens and length of every sequence; seqs: those to look at, None for
    all; query_tile: tokens of a tile, None for the whole sequence.
    """
    starts, num_queries, lengths = batch
    tiles: Int32s
    if seqs is not None:
        starts, num_queries, lengths = starts[seqs], num_queries[seqs], lengths[seqs]
    else:
        seqs = np.arange(len(starts))
    if query_tile is None:
        tiles = np.empty((5, len(seqs)), np.int32)
        tiles[0] = seqs
        tiles[1] = starts
        tiles[2] = starts + num_queries
        offset = lengths - tiles[2]
    else:
        which, tile_idx = _repetitions(-(-num_queries // query_tile))
        tiles = np.empty((5, len(which)), np.int32)
        ends = (starts + num_queries)[which]
        tiles[0] = seqs[which]
        tiles[1] = starts[which] + tile_idx * query_tile
        tiles[2] = np.minimum(tiles[1] + query_tile, ends)
        lengths = lengths[which]
        offset = lengths - ends
    # Bottom-right alignment: the last query token stands at the sequence's last position.
    left, right = window
    if causal:
        right = 0
    if right >= 0 and (query_tile is not None or right > 0):
        tiles[4] = np.minimum(np.maximum(tiles[2] + (offset + right), 0), lengths)
    else:
        tiles[4] = lengths
    tiles[3] = np.minimum(np.maximum(tiles[1] + (offset - left), 0), tiles[4]) if left >= 0 else 0
    return tiles


def _repetitions(counts: Int32s) -> tuple[Int64s, Int64s]:
    """Each index as often as counted, and which repetition each one is."""
    ends = counts.cumsum()
    which = np.arange(len(counts)).repeat(counts)
    return which, np.arange(len(which)) - (ends - counts)[which]


def _split(tiles: Int32s, num_decode_tiles: int, partition: Partition) -> tuple[Int32s, Int32s, int, int]:
    """Cut the keys of tiles into tasks: these, the merges they need, how many are decodes, and the partial tokens."""
    num_keys = tiles[4] - tiles[3]
    target = partition.num_workers * partition.tasks_per_worker
    granules = -(-int(num_keys.sum(dtype=np.int64)) // (target * partition.min_split))
    length = max(granules, 1) * partition.min_split
    if not len(num_keys) or int(num_keys.max()) <= length:
        # Decodes first, and the longest first among each.
        rank = num_keys * np.int64(-1)
        rank[num_decode_tiles:] += 2**32
        tasks = np.empty((6, len(num_keys)), np.int32)
        tasks[:5] = tiles[:, rank.argsort(kind="stable")]
        tasks[5] = -1
        return tasks, np.empty((4, 0), np.int32), num_decode_tiles, 0
    num_splits = np.maximum((num_keys + (length - 1)) // length, 1)
    is_split = num_splits > 1
    ends = num_splits.cumsum()
    firsts = ends - num_splits
    num_tokens = tiles[2] - tiles[1]
    # What each task of a tile has more than the one before it: `length` keys, and so many partial results.
    num_partials = num_tokens * is_split
    sizes = num_partials * num_splits
    partial_ends = sizes.cumsum()
    partial_starts = partial_ends - sizes
    # A tile's first task is its nth of all tasks: `nth * step` is taken off here and comes back below, for all at once.
    origins = np.empty((7, len(num_splits)), np.int64)
    origins[:5] = tiles
    origins[3] -= firsts * length
    origins[5] = np.where(is_split, partial_starts - firsts * num_partials, -1)
    origins[6] = num_partials
    num_tasks = int(ends[-1])
    wide_tasks = origins.repeat(num_splits, axis=1)
    nth = np.arange(num_tasks)
    wide_tasks[3] += nth * length
    np.minimum(wide_tasks[3] + length, wide_tasks[4], out=wide_tasks[4])
    wide_tasks[5] += nth * wide_tasks[6]
    split_tiles = is_split.nonzero()[0]
    merges = np.empty((4, len(split_tiles)), np.int32)
    merges[:2] = tiles[1:3].take(split_tiles, axis=1)
    merges[2] = partial_starts[split_tiles]
    merges[3] = num_splits[split_tiles]
    num_decode_tasks = int(firsts[num_decode_tiles]) if num_decode_tiles < len(firsts) else num_tasks
    return wide_tasks[:6].astype(np.int32), merges, num_decode_tasks, int(partial_ends[-1])
