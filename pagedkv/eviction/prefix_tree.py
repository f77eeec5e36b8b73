"""Which named block continues which: what every policy but LRU needs to let heads outlive tails."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import BlockIds, Int32s
from pagedkv.errors import InvariantViolation

__all__ = ["PrefixTree"]

HELD = 2**30
"""Stands for "has a holder" in a block's blockers; no block has as many children."""

ROOT = -1
"""The parent of a block that starts a chain. As an index it is the last, spare entry of the table of blockers."""

UNNAMED = -2
"""The parent of a block that has no name."""


class PrefixTree:
    """The forest of named blocks, and which of them nothing keeps from being evicted.

    Each block has one number, its *blockers*: how many named blocks continue it, plus HELD unless it is evictable. A
    block may be evicted exactly if that number is 0: it is an *evictable leaf*. One gather over the table therefore
    answers the question for many blocks at once.

    While any block is evictable, some evictable block is a leaf: whoever holds a block holds its ancestors (see
    PrefixCache), so that whatever continues an evictable block is evictable as well.

    Bulk verbs are a few array operations on the blocks concerned, single ones O(1). 8 bytes a block.
    """

    __slots__ = ("_blockers", "_parents", "_view_blockers", "_view_parents", "num_evictable")

    def __init__(self, num_blocks: int) -> None:
        self._set_tables(np.full(num_blocks + 1, HELD, np.int32), np.full(num_blocks, UNNAMED, np.int32))
        self.num_evictable = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool. O(1)."""
        return len(self._parents)

    def may_go(self, block_id: int) -> bool:
        """Whether this block is an evictable leaf. O(1)."""
        return bool(self._view_blockers[block_id] == 0)

    def leaves(self) -> BlockIds:
        """All evictable leaves, ascending. O(num_blocks)."""
        return np.flatnonzero(self._blockers == 0)

    def named(self) -> BlockIds:
        """All named blocks, ascending. O(num_blocks)."""
        return np.flatnonzero(self._parents != UNNAMED)

    def name(self, block_ids: BlockIds, parent_ids: BlockIds) -> None:
        """These held blocks were named, each continuing its parent (-1: none). O(n)."""
        self._parents[block_ids] = parent_ids
        # Not `+= 1`: two sequences may continue one parent in one call.
        np.add.at(self._blockers, parent_ids, 1)

    def unname(self, block_ids: BlockIds) -> BlockIds:
        """These blocks, none of them evictable, lost their names; returns the blocks that may go because of it. O(n)."""
        parent_ids = self._parents[block_ids].astype(np.int64)
        np.subtract.at(self._blockers, parent_ids, 1)
        self._parents[block_ids] = UNNAMED
        return np.unique(parent_ids[self._blockers[parent_ids] == 0])

    def add(self, block_ids: BlockIds) -> BlockIds:
        """These named blocks lost their last holder; returns the leaves among them. O(n)."""
        blockers = self._blockers[block_ids] - HELD
        self._blockers[block_ids] = blockers
        self.num_evictable += len(block_ids)
        leaves: BlockIds = block_ids[blockers == 0]
        return leaves

    def remove(self, block_ids: BlockIds) -> None:
        """These evictable blocks have a holder again, or are about to lose their name. O(n)."""
        self._blockers[block_ids] += HELD
        self.num_evictable -= len(block_ids)

    def evict(self, block_id: int) -> int | None:
        """Take out an evictable leaf; returns its parent if that is now one too. O(1)."""
        parent_id: int = self._view_parents[block_id]
        self._view_parents[block_id] = UNNAMED
        self._view_blockers[block_id] = HELD
        self.num_evictable -= 1
        blockers = self._view_blockers[parent_id] - 1
        self._view_blockers[parent_id] = blockers
        return parent_id if blockers == 0 else None

    def copy(self) -> PrefixTree:
        """An independent tree in the same state. O(num_blocks)."""
        other = PrefixTree(0)
        other._set_tables(self._blockers.copy(), self._parents.copy())
        other.num_evictable = self.num_evictable
        return other

    def check_invariants(self) -> None:
        """Recount children and evictable blocks from the parents. Raises InvariantViolation (I2, I7). O(num_blocks)."""
        named = self.named()
        parent_ids = self._parents[named].astype(np.int64)
        inner = parent_ids[parent_ids != ROOT]
        if np.any(self._parents[inner] == UNNAMED):
            raise InvariantViolation("I7", "a named block continues one that has lost its name")
        num_children = np.bincount(inner, minlength=self.num_blocks)
        blockers = self._blockers[: self.num_blocks]
        evictable = np.flatnonzero(blockers < HELD)
        if not np.array_equal(blockers % HELD, num_children):
            raise InvariantViolation("I7", "the tree counts other children than its blocks have parents")
        if np.any(self._parents[evictable] == UNNAMED) or len(evictable) != self.num_evictable:
            raise InvariantViolation("I2", f"the tree counts {self.num_evictable} evictable blocks of {len(evictable)}")
        held = named[blockers[named] >= HELD]
        held_parents = self._parents[held]
        if np.any(blockers[held_parents[held_parents != ROOT]] < HELD):
            raise InvariantViolation("I7", "a held block continues one that could be evicted")

    def _set_tables(self, blockers: Int32s, parents: Int32s) -> None:
        self._blockers, self._parents = blockers, parents
        # Single entries are read and written through views: plain ints, at less than half the cost of numpy's scalars.
        self._view_blockers, self._view_parents = blockers.data, parents.data
