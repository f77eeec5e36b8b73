"""Evictable leaves in an order of their own: the queue from which a policy takes its next victim."""

from __future__ import annotations

import heapq

import numpy as np

from pagedkv.arrays import BlockIds, Int64s
from pagedkv.errors import InvariantViolation
from pagedkv.eviction.prefix_tree import PrefixTree

__all__ = ["LeafHeap"]

ABSENT = -1


class LeafHeap:
    """A priority queue of evictable leaves by number, smallest first, cleaned lazily.

    A block that stops being an evictable leaf, because it was hit, keeps its entry: it will mostly be let go again
    with the same number, which then costs nothing. Whatever surfaces without being an evictable leaf is dropped. So a
    block has at most one live entry; entries that became void are squeezed out when there are more of them than
    blocks, which as many pushes have paid for. O(log n) amortised for each leaf pushed, n being the leaves and never
    more than the blocks of the pool. 8 bytes a block, and the heap.
    """

    __slots__ = ("_entries", "_mask", "_max_entries", "_numbers", "_shift", "_tree", "_view_numbers")

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        # An entry is one integer, the number above the block id: compared and stored more cheaply than a pair.
        self._shift = tree.num_blocks.bit_length()
        self._mask = (1 << self._shift) - 1
        self._entries: list[int] = []
        self._max_entries = 2 * tree.num_blocks + 64
        self._numbers = np.full(tree.num_blocks, ABSENT, np.int64)
        self._view_numbers = self._numbers.data

    def push(self, block_id: int, number: int) -> None:
        """Enter an evictable leaf, unless it still has the entry with this number. O(log n) amortised."""
        if self._view_numbers[block_id] == number:
            return
        self._view_numbers[block_id] = number
        heapq.heappush(self._entries, number << self._shift | block_id)
        if len(self._entries) > self._max_entries:
            self._squeeze()

    def pop(self) -> int | None:
        """Take out the evictable leaf with the smallest number; None if there is none. O(log n) amortised."""
        entries, numbers = self._entries, self._view_numbers
        while entries:
            entry = heapq.heappop(entries)
            block_id = entry & self._mask
            if numbers[block_id] == entry >> self._shift:
                numbers[block_id] = ABSENT
                if self._tree.may_go(block_id):
                    return block_id
        return None

    def discard(self, block_ids: BlockIds) -> None:
        """Make the entries of these blocks void, if they have any. O(n)."""
        self._numbers[block_ids] = ABSENT

    def numbers(self, block_ids: BlockIds) -> Int64s:
        """The number under which each block is entered, -1 for none, (n,) int64. O(n)."""
        return self._numbers[block_ids]

    def copy(self, tree: PrefixTree) -> LeafHeap:
        """An independent heap with the same entries over a copy of the tree. O(num_blocks)."""
        other = LeafHeap(tree)
        other._entries = self._entries.copy()
        other._numbers[:] = self._numbers
        return other

    def check_invariants(self) -> None:
        """Recount live entries from the heap. Raises InvariantViolation (I2). O(n log n)."""
        live = [entry for entry in self._entries if self._is_live(entry)]
        if len(set(live)) != len(live) or len(live) != np.count_nonzero(self._numbers != ABSENT):
            raise InvariantViolation("I2", f"{len(live)} live entries in a heap that counts others")
        if any(self._entries[(i - 1) // 2] > self._entries[i] for i in range(1, len(self._entries))):
            raise InvariantViolation("I2", "the heap of evictable leaves has lost its order")

    def _is_live(self, entry: int) -> bool:
        return bool(self._view_numbers[entry & self._mask] == entry >> self._shift)

    def _squeeze(self) -> None:
        self._entries = [entry for entry in self._entries if self._is_live(entry)]
        heapq.heapify(self._entries)
