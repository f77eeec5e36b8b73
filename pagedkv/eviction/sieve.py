"""SIEVE: a hand that sweeps the queue from old to new, and spares what was hit since it last came by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key
from pagedkv.errors import InvariantViolation
from pagedkv.eviction.leaf_first import LeafFirst
from pagedkv.eviction.leaf_heap import LeafHeap

__all__ = ["SIEVE"]


class SIEVE(LeafFirst):
    """Evict the first evictable leaf under the hand that was not hit since the hand last stopped at it.

    Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024, algorithm 1. Named blocks stand in order of naming,
    for good. A hit marks its blocks as visited. The hand moves from older to newer blocks: where it stops at a visited
    block, it clears the mark and moves on; where it stops at another, that is the victim, and the next sweep goes on
    behind it. Past the block that was named last, the hand starts again with the oldest.

    *Held blocks and inner blocks*, which the paper does not have: the hand passes them as if they were not there, and
    their marks stay. It stops at evictable leaves only, so a sweep costs nothing for what cannot go anyway. A block that
    becomes an evictable leaf behind the hand, such as the parent of a victim, waits for the next sweep.

    Leaves ahead of the hand and leaves behind it are in two heaps, which change places when the hand starts again. To
    spare a leaf moves it from one to the other, which the hit has paid for. O(log n) amortised for each block.
    """

    __slots__ = ("_ahead", "_behind", "_hand", "_is_visited", "_view_is_visited")

    name = "sieve"

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._ahead = LeafHeap(self._tree)
        self._behind = LeafHeap(self._tree)
        self._hand = 0  # The hand has passed the blocks with smaller numbers in this sweep.
        self._is_visited = np.zeros(num_blocks, np.bool_)
        self._view_is_visited = self._is_visited.data

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        """Put the blocks at the new end of the queue, not visited. O(n)."""
        super().on_name(block_ids, keys, parent_ids)
        self._is_visited[block_ids] = False

    def on_hit(self, block_ids: BlockIds) -> None:
        """Mark the blocks as visited. O(n)."""
        self._is_visited[block_ids] = True

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
                    raise self._no_leaf()
            self._hand = self._view_numbers[block_id] + 1
            # At once and not with the next victim: what is named in between stands at the far end of the next sweep.
            if self._hand == self._next_number:
                self._start_again()
            if not self._view_is_visited[block_id]:
                return block_id
            self._view_is_visited[block_id] = False
            self._offer(block_id)

    def _start_again(self) -> None:
        """Put the hand back to the oldest block; no evictable leaf is ahead of it."""
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

    def _check_tables(self) -> None:
        leaves = self._tree.leaves()
        numbers = self._numbers[leaves]
        is_ahead = numbers >= self._hand
        for heap, side in ((self._ahead, is_ahead), (self._behind, ~is_ahead)):
            heap.check_invariants()
            if not np.array_equal(heap.numbers(leaves[side]), numbers[side]):
                raise InvariantViolation("I2", "an evictable leaf is missing on its side of the SIEVE hand")
