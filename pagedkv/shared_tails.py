"""Copy-on-write: who may write into a partly filled block, and what is copied where not."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import BlockIds, Int64s, Rows
from pagedkv.block_pool import BlockPool
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.sequences import SequenceTable

__all__ = ["SharedTails"]


class SharedTails:
    """Keeps a mark on rows whose last, partly filled block may have another holder or a name.

    Only marked rows are looked at before they write, so sequences that were never forked or truncated pay nothing.
    """

    __slots__ = ("_pool", "_table", "num_marked")

    def __init__(self, pool: BlockPool, table: SequenceTable) -> None:
        self._pool = pool
        self._table = table
        self.num_marked = 0

    def mark(self, row: int) -> None:
        """The row must look before it writes. O(1)."""
        if not self._table.has_shared_tail[row]:
            self._table.has_shared_tail[row] = True
            self.num_marked += 1

    def unmark(self, row: int) -> None:
        """The row's tail is its own, or it has none. O(1)."""
        if self._table.has_shared_tail[row]:
            self._table.has_shared_tail[row] = False
            self.num_marked -= 1

    def rows_to_copy(self, rows: Rows, starts: Int64s) -> list[int]:
        """Indices into `rows` of those that must copy their tail before writing: another holds it, or it has a name.

        Rows write in order: where two share a block that nobody else holds, the first copies it and the second need not.
        O(rows).
        """
        table = self._table
        holders: dict[int, int] = {}
        copied = []
        for i in np.flatnonzero(table.has_shared_tail[rows]).tolist():
            # A marked row has a partly filled block: whatever moves its end to a boundary takes the mark away.
            block_id = int(table.block_tables[rows[i], int(starts[i]) // table.block_size])
            num_holders = holders.get(block_id, self._pool.count(block_id))
            if num_holders > 1 or self._pool.has_name(block_id):
                copied.append(i)
                holders[block_id] = num_holders - 1
        return copied

    def copy(self, rows: Rows, copied: list[int], targets: BlockIds) -> BlockCopies:
        """Put a fresh block in the place of the tail of each copied row; then all of `rows` may write. O(rows)."""
        table = self._table
        sources = np.empty(len(copied), np.int64)
        for i, target in enumerate(targets.tolist()):
            row = int(rows[copied[i]])
            block_idx = int(table.num_computed[row]) // table.block_size
            sources[i] = table.block_tables[row, block_idx]
            table.block_tables[row, block_idx] = target
            self._pool.release(sources[i : i + 1])
        for row in rows[table.has_shared_tail[rows]].tolist():
            self.unmark(row)
        return BlockCopies(sources, targets) if copied else NO_COPIES
