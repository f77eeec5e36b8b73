"""Counted twice: the memory recounted from its tables, never from its own counters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import BlockIds, cdiv
from pagedkv.errors import InvariantViolation
from pagedkv.row_memory import RowMemory

__all__ = ["check_memory", "check_some"]


def check_memory(memory: RowMemory, pins: Sequence[BlockIds] = ()) -> None:
    """Recount holders, tables, names and pools; `pins` are blocks held outside of the tables."""
    memory.pool.check_invariants()
    memory.host_pool.check_invariants()
    memory.cache.check_invariants()
    table = memory.sequences
    if table.num_live != int(table.is_live.sum()):
        raise InvariantViolation("I10", f"{table.num_live} live rows counted, {int(table.is_live.sum())} there")
    num_marked = int(table.has_shared_tail[table.is_live].sum())
    if memory.shared_tails.num_marked != num_marked:
        raise InvariantViolation("I5", f"{memory.shared_tails.num_marked} shared tails counted, {num_marked} marked")
    rows = np.flatnonzero(table.is_live)
    held = [table.blocks(row) for row in rows.tolist()]
    all_ids = np.arange(memory.pool.num_blocks)
    recount = np.bincount(np.concatenate([all_ids[:0], *held, *pins]), minlength=memory.pool.num_blocks)
    counts = memory.pool.counts(all_ids)
    if not np.array_equal(recount, counts):
        wrong = np.flatnonzero(recount != counts)[:20].tolist()
        raise InvariantViolation(
            "I1", f"blocks {wrong} have {counts[wrong].tolist()} holders, tables and pins {recount[wrong].tolist()}"
        )
    host_held = [memory.host_blocks[row] for row in sorted(memory.host_blocks)]
    host_ids = np.arange(memory.host_pool.num_blocks)
    host_recount = np.bincount(np.concatenate([host_ids[:0], *host_held]), minlength=memory.host_pool.num_blocks)
    if not np.array_equal(host_recount, memory.host_pool.counts(host_ids)):
        raise InvariantViolation("I1", "host blocks are not held by exactly the sequences that are swapped out")
    for row, blocks in zip(rows.tolist(), held, strict=True):
        _check_row(memory, row)
        num_named = int(table.num_named[row])
        if num_named:
            content = table.contents[row]
            if content is None or memory.cache.num_resident(content.keys(num_named), num_named) != num_named:
                raise InvariantViolation("I3", f"row {row} counts {num_named} named blocks, its keys name fewer")
            if not np.array_equal(memory.cache.blocks(content.keys(num_named), num_named), blocks[:num_named]):
                raise InvariantViolation("I3", f"row {row} has a key that names another sequence's block")


def check_some(memory: RowMemory, turn: int) -> None:
    """Look at one row and at one block, another one each turn, and at the next free block. O(1).

    Raises InvariantViolation. Finds by and by what `check_memory` finds at once, but for what only sums can tell.
    """
    table, pool = memory.sequences, memory.pool
    pool.check_some()
    memory.cache.check_block(turn % pool.num_blocks)
    # Rows that were given back are used again before new ones, so most live rows are among the first; every other turn
    # looks there only.
    num_rows = len(table.contents)
    row = turn // 2 % (num_rows if turn % 2 else min(num_rows, 2 * table.num_live + 1))
    if not table.is_live[row]:
        return
    _check_row(memory, row)
    num_blocks = table.num_blocks.item(row)
    if not num_blocks:
        return
    some, last = table.block_tables.item(row, turn % num_blocks), table.block_tables.item(row, num_blocks - 1)
    if not (pool.count(some) and pool.count(last)):
        raise InvariantViolation("I1", f"row {row} has blocks {[some, last]}, one of which nobody holds")
    is_full = table.num_computed.item(row) % memory.block_size == 0
    if not is_full and not table.has_shared_tail[row] and not pool.is_writable(last):
        raise InvariantViolation("I5", f"row {row} may write into block {last}, which is named or held by another")


def _check_row(memory: RowMemory, row: int) -> None:
    """One row's columns agree with each other. O(1)."""
    table, block_size = memory.sequences, memory.block_size
    num_blocks, num_named = table.num_blocks.item(row), table.num_named.item(row)
    num_known, num_computed, num_drafts = (
        table.num_known.item(row),
        table.num_computed.item(row),
        table.num_drafts.item(row),
    )
    if row in memory.host_blocks:
        if num_blocks or len(memory.host_blocks[row]) != cdiv(num_computed, block_size):
            raise InvariantViolation("I6", f"row {row} is swapped out with {num_blocks} device blocks")
    elif num_blocks != cdiv(num_computed + num_drafts, block_size):
        raise InvariantViolation(
            "I1", f"row {row} holds {num_blocks} blocks for {num_computed} tokens and {num_drafts} drafts"
        )
    if num_computed > num_known:
        raise InvariantViolation("I15", f"row {row} has slots for {num_computed} of {num_known} tokens")
    if num_named > num_computed // block_size:
        raise InvariantViolation("I3", f"row {row} counts {num_named} named blocks in {num_computed} tokens")
