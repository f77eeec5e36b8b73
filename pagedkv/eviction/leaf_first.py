"""Victims one by one, leaves only: what FIFO, SIEVE and S3-FIFO have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from pagedkv.arrays import MAX_NUM_BLOCKS, BlockIds, as_int
from pagedkv.block_keys import Key
from pagedkv.errors import InvariantViolation
from pagedkv.eviction.prefix_tree import PrefixTree

__all__ = ["LeafFirst"]


class LeafFirst(ABC):
    """A policy whose victim is the first in its order among the evictable leaves.

    An *evictable leaf* is a named block without a holder that no named block continues. Evicting it may make its parent
    one, which then stands where the order says: `evict(n)` is the same as `evict(1)`, n times.

    Blocks carry distinct numbers, given in order of naming, parents before whatever continues them; so no two blocks
    ever tie. A subclass says what happens when a block becomes an evictable leaf (`_offer`) and which one goes next
    (`_next_victim`).
    """

    __slots__ = ("_next_number", "_numbers", "_tree", "_view_numbers", "num_blocks")

    name: str
    tracks_names = True

    def __init__(self, num_blocks: int) -> None:
        num_blocks = as_int("num_blocks", num_blocks, at_least=0, at_most=MAX_NUM_BLOCKS)
        self.num_blocks = num_blocks
        self._tree = PrefixTree(num_blocks)
        self._numbers = np.zeros(num_blocks, np.int64)
        self._view_numbers = self._numbers.data
        self._next_number = 0

    def __len__(self) -> int:
        return self._tree.num_evictable

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:  # noqa: ARG002 - S3-FIFO reads them
        """Hang the blocks under their parents and number them. O(n)."""
        self._tree.name(block_ids, parent_ids)
        number = self._next_number
        self._next_number = number + len(block_ids)
        self._numbers[block_ids] = np.arange(number, self._next_number)

    @abstractmethod
    def on_hit(self, block_ids: BlockIds) -> None:
        """Remember what the policy remembers of a hit; some of the blocks may have no name. O(n)."""

    def on_unname(self, block_ids: BlockIds) -> None:
        """Take the blocks out of the tree. O(n), and O(log n) for each parent that may go now."""
        self._discard(block_ids)
        for block_id in self._tree.unname(block_ids).tolist():
            self._offer(block_id)

    def add(self, block_ids: BlockIds) -> None:
        """Let the blocks be evicted. O(n), and O(log n) for each leaf among them: as a rule one for a sequence."""
        for block_id in self._tree.add(block_ids).tolist():
            self._offer(block_id)

    def remove(self, block_ids: BlockIds) -> None:
        """Keep the blocks from being evicted. O(n): leaves among them are skipped when they come up."""
        self._tree.remove(block_ids)

    def evict(self, num_blocks: int) -> BlockIds:
        """Take out `num_blocks` victims, one after the other. O(log n) amortised for each."""
        victims: list[int] = []
        evict_leaf = self._tree.evict
        for _ in range(num_blocks):
            block_id = self._next_victim()
            victims.append(block_id)
            parent_id = evict_leaf(block_id)
            if parent_id is not None:
                self._offer(parent_id)
        return np.array(victims, np.int64)

    def order(self) -> Iterator[int]:
        """Evictable blocks, first to go first: what a copy of the policy evicts. O(num_blocks + n log n)."""
        return iter(self._copy().evict(len(self)).tolist())

    def check_invariants(self) -> None:
        """Recount the tree, the numbers, and the tables of the policy itself. Raises InvariantViolation. O(num_blocks)."""
        self._tree.check_invariants()
        named = self._tree.named()
        if len(np.unique(self._numbers[named])) != len(named):
            raise InvariantViolation("I14", f"two blocks have the same number in the order of {self.name}")
        self._check_tables()

    @abstractmethod
    def _offer(self, block_id: int) -> None:
        """This block has become an evictable leaf."""

    @abstractmethod
    def _next_victim(self) -> int:
        """Decide which evictable leaf goes next, and take it out of the policy's own tables."""

    @abstractmethod
    def _discard(self, block_ids: BlockIds) -> None:
        """Take blocks that lose their name out of the policy's own tables."""

    @abstractmethod
    def _copy(self) -> Self:
        """An independent policy in the same state. O(num_blocks)."""

    @abstractmethod
    def _check_tables(self) -> None:
        """Recount the policy's own tables; raise InvariantViolation."""

    def _copy_order_to(self, other: LeafFirst) -> None:
        """Give `other` a copy of the tree and the numbers. O(num_blocks)."""
        other._tree = self._tree.copy()
        other._numbers[:] = self._numbers
        other._next_number = self._next_number

    def _no_leaf(self) -> InvariantViolation:
        return InvariantViolation("I7", f"{self.name} finds no leaf among {len(self)} evictable blocks")
