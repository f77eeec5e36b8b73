"""What the block pool asks of an eviction policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key

__all__ = ["EvictionPolicy"]


class EvictionPolicy(Protocol):
    """Keeps the *evictable* blocks (count 0, still named in the prefix cache) in the order in which they should go.

    A policy sees four things happen to a block, always in this order: it is named (`on_name`), its last holder lets
    go (`add`), a hit takes it again (`remove`, `on_hit`), it is evicted (`evict`) or loses its name (`remove`).
    Whatever its order, it evicts a block only after every named block that continues it: a prefix without its head
    cannot be found, and the longest resident prefix can be found by binary search only while heads outlive tails.
    """

    @property
    def name(self) -> str:
        """Short name for reports: `lru`, `fifo`, ..."""

    def __len__(self) -> int:
        """Number of evictable blocks. O(1)."""

    @property
    def tracks_names(self) -> bool:
        """Whether `on_name`, `on_hit` and `on_unname` must be called; the default policy does without."""

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        """Blocks, all held, were named; `block_ids[i]` continues `parent_ids[i]` (-1: it starts a chain)."""

    def on_hit(self, block_ids: BlockIds) -> None:
        """A lookup took these blocks, whether or not they were evictable."""

    def add(self, block_ids: BlockIds) -> None:
        """These named blocks lost their last holder; the deepest of a sequence comes first."""

    def remove(self, block_ids: BlockIds) -> None:
        """These evictable blocks are held again."""

    def on_unname(self, block_ids: BlockIds) -> None:
        """These blocks, none of them evictable now, lost their name without being evicted."""

    def evict(self, num_blocks: int) -> BlockIds:
        """Remove and return `num_blocks` evictable blocks, first to go first. The caller ensures that there are so many."""

    def order(self) -> Iterator[int]:
        """Evictable blocks in the order in which `evict` would return them, without changing anything. O(n log n)."""

    def clear(self) -> None:
        """Forget every block: the cache was reset."""

    def check_invariants(self) -> None:
        """Recount from the tables; raise InvariantViolation."""
