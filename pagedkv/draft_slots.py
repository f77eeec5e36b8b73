"""Slots for guessed tokens: a step may compute tokens of which it is not yet known whether they come true."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int64s, Rows
from pagedkv.block_pool import BlockPool
from pagedkv.naming import BlockNaming
from pagedkv.sequences import SequenceTable

__all__ = ["DraftSlots"]


class DraftSlots:
    """Gives slots to drafts behind the last known token of a row, and keeps those of the drafts that came true.

    Drafts are the plan's, not the sequence's: they are neither known nor computed, and a block that one of them fills has
    no name. So a step that fails, or a row that is closed, has nothing to take back but blocks. The alternative, to
    append drafts as known tokens and truncate, would hash blocks that may never come true.
    """

    __slots__ = ("_naming", "_pool", "_table")

    def __init__(self, pool: BlockPool, table: SequenceTable, naming: BlockNaming | None) -> None:
        self._pool = pool
        self._table = table
        self._naming = naming

    def num_fitting(self, rows: Rows, num_drafts: Int64s) -> Int64s:
        """How many of `num_drafts[i]` drafts of row i have room, (n,) int64: in its own blocks, then in those available.

        Rows that come first take the available ones. What `try_give` is asked for by this, it gives. O(rows).
        """
        table = self._table
        num_computed, num_held = table.num_computed[rows], table.num_blocks[rows]
        num_new = -(-(num_computed + num_drafts) // table.block_size) - num_held
        num_left = self._pool.num_available - num_new.cumsum() + num_new
        num_slots = (num_held + num_left.clip(0, num_new)) * table.block_size - num_computed
        fitting: Int64s = np.minimum(num_drafts, num_slots)
        return fitting

    def try_give(self, rows: Rows, num_drafts: Int64s) -> bool:
        """Give `num_drafts[i]` drafts of row i their slots; every known token of these rows has one, and none is shared.

        Returns False, with nothing changed, if the blocks cannot be had. O(rows + blocks).
        """
        table = self._table
        stops = table.num_computed[rows] + num_drafts
        num_blocks = -(-stops // table.block_size)
        num_new = num_blocks - table.num_blocks[rows]
        total = int(np.add.reduce(num_new))
        if total:
            table.reserve_width(int(np.maximum.reduce(num_blocks)))
            block_ids = self._pool.try_allocate(total)
            if block_ids is None:
                return False
            growing = num_new.nonzero()[0]
            table.append_blocks(rows[growing], num_new[growing], block_ids)
        table.num_drafts[rows] = num_drafts
        return True

    def settle(self, rows: Rows, num_accepted: Int64s) -> None:
        """The first `num_accepted[i]` drafts of each row came true, and are known by now: they count as computed.

        The slots of the others are taken back, and the blocks that only they needed; blocks that accepted ones fill are
        named. O(rows + blocks). Nobody else holds or names what a row wrote in this step, so unlike after a truncation
        its last block need not be looked at before the next write.
        """
        table = self._table
        starts = table.num_computed[rows]
        stops = starts + num_accepted
        num_kept = -(-stops // table.block_size)
        num_dropped = table.num_blocks[rows] - num_kept
        if num_dropped.any():
            self._pool.release(table.last_blocks(rows, num_dropped))
            table.num_blocks[rows] = num_kept
        table.num_computed[rows] = stops
        table.num_drafts[rows] = 0
        if self._naming is not None:
            self._naming.name_filled(rows, starts, stops)
