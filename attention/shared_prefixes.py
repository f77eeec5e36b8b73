"""Prefixes that several sequences of a step share: found in the block tables, and read once for all of them."""

from __future__ import annotations

import numpy as np

from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.partition import Int32s, Int64s, Partition, PlanCounts

__all__ = [
    "LEAST_SAVED",
    "check_shared",
    "check_shared_blocks",
    "make_shared_plan",
    "order_by_prefix",
    "shared_with_previous",
]

LEAST_SAVED = 512
"""Keys that a group must save to be one: below, its merges cost what its reads save."""

Columns = list[tuple[int, int, int, int, int, int]]


def order_by_prefix(block_tables: Int32s) -> Int64s | None:
    """An order, (seqs,) int64, in which sequences that start with the same block stand together; None if no two do.

    block_tables: (seqs, max_blocks) int32, at least one block each. O(seqs log seqs).
    """
    firsts = block_tables[:, 0]
    order = firsts.argsort(kind="stable")
    ordered = firsts[order]
    return order if np.count_nonzero(ordered[1:] == ordered[:-1]) else None


def shared_with_previous(block_tables: Int32s, seq_lens: Int32s, query_start_loc: Int32s, block_size: int) -> Int32s:
    """(seqs,) int32: how many tokens each sequence shares, in the same blocks, with the one before it.

    Whole blocks, in which no query token of either stands. O(seqs * max_blocks).
    """
    num_before = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
    shared = np.zeros(len(seq_lens), np.int32)
    if len(seq_lens) < 2:
        return shared
    differs = block_tables[1:] != block_tables[:-1]
    num_equal = np.where(differs.any(1), differs.argmax(1), block_tables.shape[1])
    # What lies behind a sequence's blocks may be equal by accident.
    num_full = np.maximum(np.minimum(num_before[1:], num_before[:-1]), 0) // block_size
    shared[1:] = np.minimum(num_equal, num_full) * block_size
    return shared


def check_shared(shared: Int32s, seq_lens: Int32s, query_start_loc: Int32s) -> None:
    """Raise AttentionArgumentError unless sequences can share so many tokens with the one before: no query token is among
    them. O(seqs).
    """
    if shared.shape != seq_lens.shape:
        raise AttentionArgumentError(
            f"shared must have an entry for each of {len(seq_lens)} seq_lens, found {len(shared)}"
        )
    num_before = np.maximum(seq_lens - (query_start_loc[1:] - query_start_loc[:-1]), 0)
    most = np.zeros(len(shared), np.int32)
    np.minimum(num_before[1:], num_before[:-1], out=most[1:])
    # Viewed as unsigned, a negative number is a large one.
    is_wrong = shared.view(np.uint32) > most.view(np.uint32)
    if np.count_nonzero(is_wrong):
        seq_idx = int(is_wrong.argmax())
        raise AttentionArgumentError(
            f"shared[{seq_idx}] = {int(shared[seq_idx])} must be in 0..{int(most[seq_idx])}: what sequence {seq_idx} and "
            "the one before it, if any, have before their query tokens"
        )


def check_shared_blocks(shared: Int32s, block_tables: Int32s, block_size: int) -> None:
    """Raise AttentionArgumentError unless shared tokens lie in the same blocks. O(seqs * blocks shared)."""
    num_shared = -(-shared[1:] // block_size)
    width = int(num_shared.max(initial=0))
    differs = block_tables[1:, :width] != block_tables[:-1, :width]
    is_wrong = (differs & (np.arange(differs.shape[1]) < num_shared[:, None])).any(1)
    if np.count_nonzero(is_wrong):
        seq_idx = int(is_wrong.argmax()) + 1
        raise AttentionArgumentError(
            f"sequence {seq_idx} does not start with the same {int(num_shared[seq_idx - 1])} blocks as the one before it"
        )


def make_shared_plan(
    seq_lens: Int32s, query_start_loc: Int32s, shared: Int32s, partition: Partition, *, heads_per_kv_head: int
) -> tuple[Int32s, Int32s, PlanCounts] | None:
    """Tasks, merges and counts as `make_plan` gives them, each group's prefix computed once, for all of its query tokens.

    A task over a prefix names the group's first sequence, whose table and causal limit serve the others too: their query
    tokens come later in the batch, so they count as later positions, and see the whole prefix as they should.

    None if no group saves `LEAST_SAVED` keys, if a sequence is no decode, or if its own keys would have to be split.
    O(seqs + tasks); Python-level work for each group.
    """
    num_queries = query_start_loc[1:] - query_start_loc[:-1]
    if not len(num_queries) or int(num_queries.max()) * heads_per_kv_head > partition.max_decode_rows:
        return None
    groups = _groups(shared, num_queries)
    if not groups:
        return None
    own = np.empty((6, len(seq_lens)), np.int32)
    own[0], own[1], own[2] = np.arange(len(seq_lens)), query_start_loc[:-1], query_start_loc[1:]
    own[3], own[4], own[5] = 0, seq_lens, -1
    for first, end, num_shared in groups:
        own[3, first:end] = num_shared
    num_own = own[4] - own[3]
    length = _split_length(int(num_own.sum()) + sum(num_shared for _, _, num_shared in groups), partition)
    if int(num_own.max()) > length:
        return None
    tile = max(partition.query_tile, 1)
    few: Columns = []
    many: Columns = []
    merges: list[tuple[int, int, int, int]] = []
    num_partials = 0
    for first, end, num_shared in groups:
        token, end_token = int(query_start_loc[first]), int(query_start_loc[end])
        num_tokens = end_token - token
        is_few = num_tokens * heads_per_kv_head <= partition.max_decode_rows
        keys = range(0, num_shared, length)
        for nth, key in enumerate(keys):
            base = num_partials + nth * num_tokens - token
            for start in range(token, end_token, tile):
                stop = min(start + tile, end_token)
                column = (first, start, stop, key, min(key + length, num_shared), base + start)
                (few if is_few else many).append(column)
        own[5, first:end] = own[1, first:end] + (num_partials + len(keys) * num_tokens - token)
        merges.append((token, end_token, num_partials, len(keys) + 1))
        num_partials += (len(keys) + 1) * num_tokens
    longest_first = (-num_own).argsort(kind="stable")
    tasks = np.concatenate((_table(few), own[:, longest_first], _table(many)), axis=1)
    counts = PlanCounts(len(few) + len(seq_lens), len(many), len(merges), num_partials)
    return tasks, np.array(merges, np.int32).T.copy(), counts


def _groups(shared: Int32s, num_queries: Int32s) -> list[tuple[int, int, int]]:
    """First sequence, end, and shared tokens of each run of sequences that share enough to be worth it."""
    joined = np.zeros(len(shared) + 1, np.bool_)
    joined[1:-1] = (shared[1:] > 0) & (num_queries[1:] > 0)
    edges = np.diff(joined.astype(np.int8)).nonzero()[0].tolist()
    groups = []
    for before, last in zip(edges[::2], edges[1::2], strict=True):
        # Edges stand before the first that shares with its predecessor, which is `before`, and after the last.
        num_shared = int(shared[before + 1 : last + 1].min())
        if num_queries[before] and (last - before) * num_shared >= LEAST_SAVED:
            groups.append((before, last + 1, num_shared))
    return groups


def _split_length(num_keys: int, partition: Partition) -> int:
    """Keys of a split: so many that there are about enough tasks for all workers."""
    target = partition.num_workers * partition.tasks_per_worker
    return max(-(-num_keys // (target * partition.min_split)), 1) * partition.min_split


def _table(columns: Columns) -> Int32s:
    return np.array(columns, np.int32).reshape(-1, 6).T
