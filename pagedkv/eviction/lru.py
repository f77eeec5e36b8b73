"""Least recently used: the default policy, in bulk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key
from pagedkv.errors import InvariantViolation

__all__ = ["LRU"]


class LRU:
    """Evict the block that was let go longest ago.

    A queue as a log: blocks are appended at the tail as they are let go, victims are cut off at the head, and a block
    that is hit leaves a hole (-1) at its place. Every verb is a few array operations on the blocks concerned; holes are
    squeezed out when the log is full, which at least `num_blocks` appends have paid for. 12 bytes a block.

    No tree is needed to let heads outlive tails: whoever holds a block holds its ancestors too (see PrefixCache), and
    sequences are let go deepest block first, so ancestors always come later in the log.
    """

    __slots__ = ("_head", "_log", "_num_holes", "_place", "_tail", "num_blocks")

    name = "lru"
    tracks_names = False

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._log = np.empty(2 * num_blocks + 64, np.int32)
        self._place = np.zeros(num_blocks, np.int32)
        self._head = 0
        self._tail = 0
        self._num_holes = 0

    def __len__(self) -> int:
        return self._tail - self._head - self._num_holes

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        """Nothing to do: only letting go counts."""

    def on_hit(self, block_ids: BlockIds) -> None:
        """Nothing to do: a hit takes the block out, and letting go puts it back at the tail."""

    def on_unname(self, block_ids: BlockIds) -> None:
        """Nothing to do: only evictable blocks are known here."""

    def add(self, block_ids: BlockIds) -> None:
        """Append blocks at the tail. O(n) amortised."""
        num = len(block_ids)
        if self._tail + num > len(self._log):
            self._squeeze()
        tail = self._tail
        self._log[tail : tail + num] = block_ids
        self._place[block_ids] = np.arange(tail, tail + num, dtype=np.int32)
        self._tail = tail + num

    def remove(self, block_ids: BlockIds) -> None:
        """Leave holes where these blocks stood. O(n)."""
        self._log[self._place[block_ids].astype(np.int64)] = -1
        self._num_holes += len(block_ids)

    def evict(self, num_blocks: int) -> BlockIds:
        """Cut `num_blocks` blocks off the head. O(n) amortised: a hole is skipped once."""
        head = self._head
        if self._num_holes == 0:
            self._head = head + num_blocks
            return self._log[head : head + num_blocks].astype(np.int64)
        width = 2 * num_blocks + 16
        while True:
            window = self._log[head : min(head + width, self._tail)]
            blocks = np.flatnonzero(window >= 0)
            if len(blocks) >= num_blocks:
                break
            width *= 4
        cut = int(blocks[num_blocks - 1]) + 1 if num_blocks else 0
        self._head = head + cut
        self._num_holes -= cut - num_blocks
        return window[blocks[:num_blocks]].astype(np.int64)

    def order(self) -> Iterator[int]:
        """Evictable blocks, first to go first. O(n)."""
        entries = self._log[self._head : self._tail]
        return iter(entries[entries >= 0].tolist())

    def check_invariants(self) -> None:
        """Recount holes, and compare each block's place with the log."""
        entries = self._log[self._head : self._tail]
        places = np.flatnonzero(entries >= 0) + self._head
        if len(places) != len(self):
            raise InvariantViolation("I2", f"LRU counts {len(self)} blocks, its log holds {len(places)}")
        if not np.array_equal(self._place[self._log[places]], places):
            raise InvariantViolation("I2", "a block stands in the LRU log at another place than it remembers")

    def _squeeze(self) -> None:
        entries = self._log[self._head : self._tail]
        kept = entries[entries >= 0]
        self._log[: len(kept)] = kept
        self._place[kept] = np.arange(len(kept), dtype=np.int32)
        self._head, self._tail, self._num_holes = 0, len(kept), 0
