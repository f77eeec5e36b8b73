"""SIEVE: a hand that sweeps the queue, from old to new, and spares what was hit since it last came by."""

from __future__ import annotations

from typing import Self

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.errors import InvariantViolation
from pagedkv.eviction.leaf_first import LeafFirst
from pagedkv.eviction.leaf_heap import LeafHeap

__all__ = ["SIEVE"]


class SIEVE(LeafFirst):
    """Evict the first evictable leaf under the hand that was not hit since the hand last stopped at it.

    Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024, Algorithm 1. Named blocks stand in order of naming,
    for good. A hit marks a block as visited. The hand moves from older to newer blocks: it clears the mark of a visited
    block and moves on; it evicts one that is not visited, and stays just behind its place. Past the block that was
    named last, it starts again with the oldest.

    *Held blocks and inner blocks* (the paper has neither): the hand passes them as if they were not there, and their
    marks stay. It stops at evictable leaves only, so a sweep costs nothing for what cannot go anyway.

    Leaves ahead of the hand and those behind it are in two heaps, which change places when the hand starts again. A
    spared leaf moves from one to the other, which the hit has paid for: O(log n) amortised for each block.
    """

    __slots__ = ("_ahead", "_behind", "_hand", "_is_visited", "_view_is_visited")

    name = "sieve"

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._ahead = LeafHeap(self._tree)
        self._behind = LeafHeap(self._tree)
        self._hand = 0  # The number of the first block that the hand has not passed in this sweep.
        self._is_visited = np.zeros(num_blocks, np.bool_)
        self._view_is_visited = self._is_visited.data

    def on_hit(self, block_ids: BlockIds) -> None:
        """Mark the blocks as visited. O(n)."""
        self._is_visited[block_ids] = True

    def check_invariants(self) -> None:
        """Recount the tree, and find every leaf on its side of the hand. Raises InvariantViolation. O(num_blocks)."""
        self._check_order()
        self._ahead.check_invariants()
        self._behind.check_invariants()
        leaves = self._tree.leaves()
        numbers = self._numbers[leaves]
        is_ahead = numbers >= self._hand
        ahead, behind = leaves[is_ahead], leaves[~is_ahead]
        if not np.array_equal(self._ahead.number_of(ahead), numbers[is_ahead]) or not np.array_equal(
            self._behind.number_of(behind), numbers[~is_ahead]
        ):
            raise InvariantViolation("I2", "an evictable leaf is missing on its side of the SIEVE hand")

    def on_name(self, block_ids: BlockIds, keys: object, parent_ids: BlockIds) -> None:
        super().on_name(block_ids, keys, parent_ids)
        self._is_visited[block_ids] = False

    def _offer(self, block_id: int) -> None:
        number = self._view_numbers[block_id]
        (self._ahead if number >= self._hand else self._behind).push(block_id, number)

    def _next_victim(self) -> int:
        while True:
            block_id = self._ahead.pop()
            if block_id is None:
                self._start_again()
                block_id = self._ahead.pop()
                if block_id is None:
                    raise InvariantViolation("I7", "no evictable leaf is left for SIEVE")
            self._hand = self._view_numbers[block_id] + 1
            if self._hand == self._next_number:
                self._start_again()
            if not self._view_is_visited[block_id]:
                return block_id
            self._view_is_visited[block_id] = False
            self._offer(block_id)

    def _start_again(self) -> None:
        """Put the hand back to the oldest block. Nothing is ahead of it any more."""
        self._hand = 0
        self._ahead, self._behind = self._behind, self._ahead

    def _discard(self, block_ids: BlockIds) -> None:
        self._ahead.discard(block_ids)
        self._behind.discard(block_ids)

    def _copy(self) -> Self:
        other = type(self)(self._tree.num_blocks)
        self._copy_order_to(other)
        other._ahead = self._ahead.copy(other._tree)
        other._behind = self._behind.copy(other._tree)
        other._hand = self._hand
        other._is_visited[:] = self._is_visited
        return other
