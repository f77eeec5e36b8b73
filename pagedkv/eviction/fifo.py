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

    A parent is named before whatever continues it. So once a leaf is the first to go, its whole branch goes, tail to
    head, up to a block that is held or has another branch: O(1) for each of them, and O(log n) amortised for the leaf.
    """

    __slots__ = ("_leaves",)

    name = "fifo"

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._leaves = LeafHeap(self._tree)

    def on_hit(self, block_ids: BlockIds) -> None:
        """Nothing to do: hits do not count."""

    def evict(self, num_blocks: int) -> BlockIds:
        """Take out `num_blocks` victims, branch by branch. O(1) amortised for each, and O(log n) for each branch."""
        victims: list[int] = []
        evict_leaf = self._tree.evict
        # The parent that became a leaf was named before its child, and the child before all other leaves.
        block_id: int | None = None
        for _ in range(num_blocks):
            if block_id is None:
                block_id = self._next_victim()
            victims.append(block_id)
            block_id = evict_leaf(block_id)
        if block_id is not None:
            self._offer(block_id)
        return np.array(victims, np.int64)

    def _offer(self, block_id: int) -> None:
        self._leaves.push(block_id, self._view_numbers[block_id])

    def _next_victim(self) -> int:
        block_id = self._leaves.pop()
        if block_id is None:
            raise self._no_leaf()
        return block_id

    def _discard(self, block_ids: BlockIds) -> None:
        self._leaves.discard(block_ids)

    def _copy(self) -> Self:
        other = type(self)(self._tree.num_blocks)
        self._copy_order_to(other)
        other._leaves = self._leaves.copy(other._tree)
        return other

    def _check_tables(self) -> None:
        self._leaves.check_invariants()
        leaves = self._tree.leaves()
        if not np.array_equal(self._leaves.numbers(leaves), self._numbers[leaves]):
            raise InvariantViolation("I2", "an evictable leaf is missing from the FIFO queue")
