"""First in, first out: the order of naming, whatever is hit."""

from __future__ import annotations

from typing import Self

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.errors import InvariantViolation
from pagedkv.eviction.leaf_first import LeafFirst
from pagedkv.eviction.leaf_heap import LeafHeap

__all__ = ["FIFO"]


class FIFO(LeafFirst):
    """Evict the evictable leaf that was named first.

    A parent is named before whatever continues it, so once a leaf is the first to go, its whole branch goes, tail to
    head, up to a block that is held or has another branch. O(log n) amortised for each block.
    """

    __slots__ = ("_leaves",)

    name = "fifo"

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._leaves = LeafHeap(self._tree)

    def on_hit(self, block_ids: BlockIds) -> None:
        """Nothing to do: hits do not count."""

    def check_invariants(self) -> None:
        """Recount the tree, and find every evictable leaf in the queue. Raises InvariantViolation. O(num_blocks)."""
        self._check_order()
        self._leaves.check_invariants()
        leaves = self._tree.leaves()
        if not np.array_equal(self._leaves.number_of(leaves), self._numbers[leaves]):
            raise InvariantViolation("I2", "an evictable leaf is missing from the FIFO queue")

    def _offer(self, block_id: int) -> None:
        self._leaves.push(block_id, self._view_numbers[block_id])

    def _next_victim(self) -> int:
        block_id = self._leaves.pop()
        if block_id is None:
            raise InvariantViolation("I7", "no evictable leaf is left for FIFO")
        return block_id

    def _discard(self, block_ids: BlockIds) -> None:
        self._leaves.discard(block_ids)

    def _copy(self) -> Self:
        other = type(self)(self._tree.num_blocks)
        self._copy_order_to(other)
        other._leaves = self._leaves.copy(other._tree)
        return other
