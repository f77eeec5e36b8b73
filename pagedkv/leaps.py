"""Many steps at once: what a simulator skips over while every running row does nothing but decode."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int64s, Rows
from pagedkv.block_pool import BlockPool
from pagedkv.naming import BlockNaming, in_order_of_steps
from pagedkv.sequences import SequenceTable
from pagedkv.shared_tails import SharedTails

__all__ = ["Leaps"]


class Leaps:
    """Appends many tokens to rows of simulated content, and leaves every block and name as single steps would have."""

    __slots__ = ("_naming", "_pool", "_shared_tails", "_table")

    def __init__(
        self, pool: BlockPool, table: SequenceTable, shared_tails: SharedTails, naming: BlockNaming | None
    ) -> None:
        self._pool = pool
        self._table = table
        self._shared_tails = shared_tails
        self._naming = naming

    @property
    def are_possible(self) -> bool:
        """Whether appending to rows needs no copies on write. O(1)."""
        return self._shared_tails.num_marked == 0

    def num_affordable(self, rows: Rows, num_steps: int) -> int:
        """How often, at most `num_steps`, each row can take one more token before blocks run short. O(rows log steps)."""
        table, num_available = self._table, self._pool.num_available
        if len(rows) * (num_steps // table.block_size + 1) <= num_available:
            return num_steps

        def needed(num: int) -> int:
            return int(np.add.reduce(table.num_blocks_to_append(rows, num)))

        if needed(num_steps) <= num_available:
            return num_steps
        low, high = 0, num_steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= num_available else (low, middle)
        return low

    def append(self, rows: Rows, num_steps: int) -> Int64s:
        """Append `num_steps` >= 1 tokens to each row of simulated content, one a step, each step making one more known.

        Blocks are taken and named in the order in which single steps would have done it: by step, then by row. The
        caller has made sure that they suffice. Returns (num_steps,) int64: blocks taken in each. O(rows + blocks).
        """
        table = self._table
        block_size = table.block_size
        starts = table.num_computed[rows]
        stops = starts + num_steps
        first = starts // block_size
        offsets = starts - first * block_size
        num_filled = (offsets + num_steps) // block_size
        owners, steps = in_order_of_steps(num_filled, block_size - 1 - offsets, block_size)
        filled = (starts[owners] + steps) // block_size
        num_taken = np.zeros(num_steps, np.int64)
        # A row takes a block in the step after it filled one, and in the first step if it stands at a block's start.
        at_start = (offsets == 0).nonzero()[0]
        num_later = int(steps.searchsorted(num_steps - 1))
        if len(at_start) + num_later:
            table.reserve_width(int(np.maximum.reduce(stops) - 1) // block_size + 1)
            block_ids = self._pool.allocate(len(at_start) + num_later)
            table.block_tables[rows[at_start], first[at_start]] = block_ids[: len(at_start)]
            table.block_tables[rows[owners[:num_later]], filled[:num_later] + 1] = block_ids[len(at_start) :]
            table.num_blocks[rows] = (stops + block_size - 1) // block_size
            num_taken = np.bincount(steps[:num_later] + 1, minlength=num_steps)
            num_taken[0] = len(at_start)
        table.num_known[rows] = stops + 1
        table.num_computed[rows] = stops
        if self._naming is not None and len(owners):
            self._naming.name_fresh(rows, first, num_filled, owners=owners, block_idx=filled)
        return num_taken
