"""Content ids in run-length form: which prompt blocks of a trace are equal, and what a cache could make of it.

A content id names one block of a prompt *and the whole prefix before it*: equal id means equal block and equal prefix.
The ids of consecutive new blocks are mostly consecutive integers, so a request is a few runs `[start, start + count)`.
The runs of request `i` are those in `run_offsets[i]:run_offsets[i + 1]`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces.limits import MAX_TOKENS

__all__ = ["encode_runs", "expand_runs", "find_prefix_conflict", "leading_hits", "merge_runs", "number_prefixes"]

Int64Array = npt.NDArray[np.int64]


def encode_runs(ids: Int64Array, offsets: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Turn ids, packed request after request, into maximal runs.

    ids:     (num_ids,); request `i` owns `ids[offsets[i]:offsets[i + 1]]`
    offsets: (n + 1,)
    Returns `run_starts`, `run_counts`, `run_offsets`. O(num_ids).
    """
    is_start = np.ones(len(ids), dtype=np.bool_)
    is_start[1:] = ids[1:] != ids[:-1] + 1
    first_ids = offsets[:-1]
    is_start[first_ids[first_ids < offsets[1:]]] = True
    positions = np.flatnonzero(is_start)
    counts = np.diff(positions, append=len(ids))
    return ids[positions], counts.astype(np.int64), np.searchsorted(positions, offsets).astype(np.int64)


def merge_runs(
    starts: Int64Array, counts: Int64Array, offsets: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Join neighbouring runs of one request that touch, so that equal ids have one form. O(num_runs)."""
    is_start = np.ones(len(starts), dtype=np.bool_)
    # A count out of range must not hide in a sum that wraps round; it stays, for the check of the promises to find.
    is_sound = (counts >= 1) & (counts <= MAX_TOKENS)
    is_start[1:] = (starts[1:] != starts[:-1] + counts[:-1]) | ~(is_sound[1:] & is_sound[:-1])
    first_runs = offsets[:-1]
    is_start[first_runs[first_runs < offsets[1:]]] = True
    if is_start.all():
        return starts, counts, offsets
    positions = np.flatnonzero(is_start)
    return starts[positions], np.add.reduceat(counts, positions), np.searchsorted(positions, offsets).astype(np.int64)


def expand_runs(starts: Int64Array, counts: Int64Array) -> Int64Array:
    """Return the ids that these runs stand for. O(sum of counts).

    >>> expand_runs(np.array([7, 2]), np.array([3, 1])).tolist()
    [7, 8, 9, 2]
    """
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def find_prefix_conflict(starts: Int64Array, counts: Int64Array, offsets: Int64Array) -> int | None:
    """Return a run whose first id follows another id elsewhere, or None if all ids are prefix ids.

    Ids name prefixes exactly if each id has one predecessor wherever it occurs: then its whole chain is fixed. Inside
    a run the predecessor is the id minus one, so only the first ids of runs need a look. Takes merged runs. O(R log
    R).
    """
    if not len(starts):
        return None
    previous = np.empty_like(starts)
    previous[0] = -1
    previous[1:] = starts[:-1] + counts[:-1] - 1
    first_runs = offsets[:-1]
    previous[first_runs[first_runs < offsets[1:]]] = -1

    order = np.argsort(starts, kind="stable")
    by_start, by_start_previous = starts[order], previous[order]
    differs = (by_start[1:] == by_start[:-1]) & (by_start_previous[1:] != by_start_previous[:-1])
    # An id that begins a run here and lies inside a run there has two predecessors.
    reach = np.maximum.accumulate(by_start + counts[order])
    covering = np.searchsorted(by_start, by_start, side="left") - 1
    is_inside = (covering >= 0) & (reach[covering] > by_start)
    conflicts = np.concatenate([order[1:][differs], order[is_inside]])
    return int(conflicts.min()) if len(conflicts) else None


def number_prefixes(ids: Int64Array, offsets: Int64Array) -> Int64Array:
    """Replace block ids by prefix ids: equal where the whole sequence of ids up to there is equal.

    New ids are dense, in order of first appearance. One pass per depth, O(num_ids log num_ids) in all; no dictionary,
    since 15 million ids as Python tuples would take gigabytes.

    >>> number_prefixes(np.array([5, 9, 8, 9]), np.array([0, 2, 4])).tolist()
    [0, 1, 2, 3]
    """
    lengths = np.diff(offsets)
    parents = np.full(len(lengths), -1, dtype=np.int64)
    numbered = np.empty_like(ids)
    rows, depth, num_prefixes = np.flatnonzero(lengths > 0), 0, 0
    while len(rows):
        positions = offsets[rows] + depth
        row_parents, row_ids = parents[rows], ids[positions]
        order = np.lexsort((row_ids, row_parents))
        is_new = np.ones(len(rows), dtype=np.bool_)
        is_new[1:] = np.diff(row_parents[order]).astype(np.bool_) | np.diff(row_ids[order]).astype(np.bool_)
        group = np.empty(len(rows), dtype=np.int64)
        group[order] = np.cumsum(is_new) - 1
        numbered[positions] = parents[rows] = num_prefixes + group
        num_prefixes += int(is_new.sum())
        depth += 1
        rows = rows[lengths[rows] > depth]
    first_seen = np.unique(numbered, return_index=True)[1]
    rank = np.empty(num_prefixes, dtype=np.int64)
    rank[np.argsort(first_seen)] = np.arange(num_prefixes)
    return rank[numbered]


def leading_hits(starts: Int64Array, counts: Int64Array, offsets: Int64Array) -> Int64Array:
    """Count, for each request in turn, the leading blocks that an unlimited cache would hold already.

    Every request's blocks are inserted after its lookup. Because ids name prefixes, all blocks seen before form a
    leading run, so hits are the blocks that are not new. Returns (n,) int64. O(R log R), independent of the number of
    ids: the id line is cut at all ends of runs, and each piece is painted once, by the first request that holds it.
    """
    bounds, ends = np.unique(np.concatenate([starts, starts + counts]), return_inverse=True)
    sizes = np.diff(bounds).tolist()
    # unpainted[p] leads to the first unpainted piece at or after p (union-find with path halving).
    unpainted = list(range(len(bounds) + 1))
    num_new = np.zeros(len(starts) + 1, dtype=np.int64)
    spans = zip(ends[: len(starts)].tolist(), ends[len(starts) :].tolist(), strict=True)
    for run, (piece, end) in enumerate(spans):
        new = 0
        while True:
            while unpainted[piece] != piece:
                unpainted[piece] = piece = unpainted[unpainted[piece]]
            if piece >= end:
                break
            new += sizes[piece]
            unpainted[piece] = piece + 1
        num_new[run + 1] = new
    num_misses = np.cumsum(num_new)[offsets]
    num_blocks = np.concatenate([[0], np.cumsum(counts)])[offsets]
    return np.diff(num_blocks) - np.diff(num_misses)
