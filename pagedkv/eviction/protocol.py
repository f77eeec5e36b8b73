"""What the block pool asks of an eviction policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key

__all__ = ["EvictionPolicy"]


class EvictionPolicy(Protocol):
    """Keeps the *evictable* blocks (count 0, still named in the prefix cache) in the order in which they should go.

    What a policy hears of a block between two times of being free:

        on_name                                   held, and now named
        on_hit                                    shared while it was held: it got one more holder
        add                                       its last holder let go: evictable
        remove, on_hit                            hit while it was evictable: held again
        evict                                     evicted: its name is gone
        on_unname, or remove then on_unname       its name was taken away, while held or while evictable

    *Leaf first.* Whatever its order, a policy evicts a block only after every named block that continues it: a prefix
    without its head cannot be found, and the longest resident prefix can be found by binary search only while heads
    outlive tails. Its victim is the first in its order among the *evictable leaves*, the evictable blocks that no named
    block continues. It may rely on three promises of pool and prefix cache, which make sure that there is one:

    - a parent is held and named when a block is named that continues it, and was named before it;
    - whoever holds a named block holds its ancestors, so whatever continues an evictable block is evictable;
    - a block loses its name, without being evicted, only together with every named block that continues it.

    Decisions are a function of these calls alone: no clock, no randomness, and no two blocks ever tie.
    """

    num_blocks: int
    """Size of the pool that it was made for."""

    @property
    def name(self) -> str:
        """Short name for reports: `lru`, `fifo`, ..."""

    def __len__(self) -> int:
        """Number of evictable blocks. O(1)."""

    @property
    def tracks_names(self) -> bool:
        """Whether `on_name`, `on_hit` and `on_unname` must be called; the default policy does without."""

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        """Blocks, all held, were named; `block_ids[i]` continues `parent_ids[i]` (-1: it starts a chain).

        A parent may be named in the same call, before its children; several blocks may have the same parent.
        """

    def on_hit(self, block_ids: BlockIds) -> None:
        """These blocks got one more holder, whether or not they were evictable, and a few perhaps without a name."""

    def add(self, block_ids: BlockIds) -> None:
        """These named blocks lost their last holder; the deepest of a sequence comes first."""

    def remove(self, block_ids: BlockIds) -> None:
        """These evictable blocks are held again, or are about to lose their name."""

    def on_unname(self, block_ids: BlockIds) -> None:
        """These blocks, none of them evictable now, lost their name without being evicted."""

    def evict(self, num_blocks: int) -> BlockIds:
        """Remove and return `num_blocks` victims, first to go first; the same as one at a time.

        The caller ensures that so many blocks are evictable.
        """

    def order(self) -> Iterator[int]:
        """All evictable blocks in the order in which `evict` would return them, without changing anything. O(n log n)."""

    def check_invariants(self) -> None:
        """Recount from the tables; raise InvariantViolation."""
