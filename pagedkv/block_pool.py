"""Who holds which block: reference counts, free blocks and evictable blocks of one pool."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pagedkv.arrays import FEW, MAX_NUM_BLOCKS, BlockIds, Int32s, as_int
from pagedkv.errors import BlockStateError, ConfigError, InvariantViolation, OutOfBlocksError
from pagedkv.eviction.lru import LRU
from pagedkv.eviction.protocol import EvictionPolicy

__all__ = ["MAX_NUM_BLOCKS", "BlockPool"]

NO_BLOCKS = np.empty(0, np.int64)

# A block's state is one number, `2 * count + named`, so that a single gather tells both whether it is held and
# whether the prefix cache knows it. That halves the array operations of every verb.
NAMED = 1
HOLDER = 2


def extremes(values: Int32s) -> tuple[int, int]:
    """The lowest and the highest of some numbers, at least one. O(n).

    >>> extremes(np.array([2, 5, 3], np.int32))
    (2, 5)
    """
    if len(values) <= FEW:
        few = values.tolist()
        return min(few), max(few)
    return int(np.minimum.reduce(values)), int(np.maximum.reduce(values))


class BlockPool:
    """`num_blocks` blocks, each *used* (count > 0), *evictable* (count 0, named in the prefix cache) or *free*.

    Blocks go out free ones first, the most recently freed before the others and runs in ascending order, then
    evictable ones in the eviction policy's order. All verbs take or return arrays of block ids, do all of their work or
    raise and change nothing, and cost O(1) amortised per block, whatever the size of the pool.

    >>> pool = BlockPool(4)
    >>> taken = pool.allocate(3)
    >>> taken.tolist(), pool.num_free
    ([0, 1, 2], 1)
    >>> pool.try_allocate(2) is None
    True
    >>> pool.release(taken)
    >>> pool.num_free
    4
    """

    __slots__ = ("_free", "_num_free", "_state", "num_blocks", "on_evict", "policy", "taken")

    def __init__(self, num_blocks: int, policy: EvictionPolicy | None = None) -> None:
        self.num_blocks = as_int("num_blocks", num_blocks, at_least=0, at_most=MAX_NUM_BLOCKS)
        self.policy: EvictionPolicy = LRU(num_blocks) if policy is None else policy
        if self.policy.num_blocks != num_blocks:
            raise ConfigError(
                f"the eviction policy was made for {self.policy.num_blocks} blocks, the pool has {num_blocks}"
            )
        self.on_evict: Callable[[BlockIds], None] | None = None
        self.taken: list[BlockIds] | None = None
        """What was handed out, call by call, while somebody wants to know."""
        self._state = np.zeros(num_blocks, np.int32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # A stack: the next block out is the last one.
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and the prefix cache does not know. O(1)."""
        return self._num_free

    @property
    def num_evictable(self) -> int:
        """Blocks that nobody holds but the prefix cache knows. O(1)."""
        return len(self.policy)

    @property
    def num_available(self) -> int:
        """Blocks that an allocation could get: free and evictable. O(1)."""
        return self._num_free + len(self.policy)

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder. O(1)."""
        return self.num_blocks - self._num_free - len(self.policy)

    def counts(self, block_ids: BlockIds) -> Int32s:
        """Number of holders of each block, (n,) int32."""
        counts: Int32s = self._state[block_ids] >> 1
        return counts

    def is_named(self, block_ids: BlockIds) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether the prefix cache knows each block, (n,) bool."""
        return (self._state[block_ids] & NAMED).astype(np.bool_)

    def count(self, block_id: int) -> int:
        """Number of holders of one block. O(1)."""
        return self._state.item(block_id) >> 1

    def has_name(self, block_id: int) -> bool:
        """Whether the prefix cache knows one block. O(1)."""
        return bool(self._state.item(block_id) & NAMED)

    def is_writable(self, block_id: int) -> bool:
        """Whether its holder may write into the block: it has no other holder, and no name that promises its content."""
        return self._state.item(block_id) == HOLDER

    def num_evictable_among(self, block_ids: BlockIds) -> int:
        """How many of these blocks nobody holds at present. O(n)."""
        return int(np.count_nonzero(self._state[block_ids] < HOLDER))

    def try_allocate(self, num_blocks: int) -> BlockIds | None:
        """Take `num_blocks` blocks, free ones first, then evictable ones in the policy's order.

        Returns None, with the pool unchanged, if fewer can be had. O(num_blocks) amortised.

        >>> BlockPool(num_blocks=2).try_allocate(3) is None
        True
        """
        if num_blocks.__class__ is not int or num_blocks < 0:
            num_blocks = as_int("num_blocks", num_blocks, at_least=0, at_most=MAX_NUM_BLOCKS)
        num_free = self._num_free
        if num_blocks <= num_free:
            block_ids = self._free[num_free - num_blocks : num_free][::-1].astype(np.int64)
            self._num_free = num_free - num_blocks
        elif num_blocks > num_free + len(self.policy):
            return None
        else:
            block_ids = self._evict(num_blocks - num_free)
            if num_free:
                block_ids = np.concatenate((self._free[:num_free][::-1], block_ids), dtype=np.int64)
                self._num_free = 0
        self._state[block_ids] = HOLDER
        if self.taken is not None:
            self.taken.append(block_ids)
        return block_ids

    def allocate(self, num_blocks: int) -> BlockIds:
        """Take `num_blocks` blocks as `try_allocate` does; raises OutOfBlocksError, pool unchanged, if there are fewer."""
        block_ids = self.try_allocate(num_blocks)
        if block_ids is None:
            raise OutOfBlocksError(num_blocks, self.num_available)
        return block_ids

    def acquire(self, block_ids: BlockIds) -> None:
        """Add one holder to each block, which must be used or evictable (a hit). O(n).

        Raises BlockStateError, pool unchanged, for unknown ids, ids named twice, and free blocks.
        """
        block_ids = self._check_ids(block_ids)
        if not len(block_ids):
            return
        before = self._state[block_ids]
        lowest, highest = extremes(before)
        if lowest == 0:
            raise BlockStateError(f"blocks {block_ids[before == 0].tolist()} are free: there is nothing to share")
        if lowest == NAMED:
            self.policy.remove(block_ids if highest == NAMED else block_ids[before == NAMED])
        self._state[block_ids] = before + HOLDER
        if self.policy.tracks_names:
            self.policy.on_hit(block_ids)

    def release(self, block_ids: BlockIds) -> None:
        """Take one holder from each block; the deepest block of a sequence comes first. O(n).

        Blocks without holders become evictable if they are named, in the order given, and free otherwise.
        Raises BlockStateError, pool unchanged, for unknown ids, ids named twice, and blocks without a holder.
        """
        block_ids = self._check_ids(block_ids)
        if not len(block_ids):
            return
        before = self._state[block_ids]
        lowest, highest = extremes(before)
        if lowest < HOLDER:
            raise BlockStateError(f"blocks {block_ids[before < HOLDER].tolist()} have no holder: released twice?")
        self._state[block_ids] = before - HOLDER
        # Mostly all of them are private, or all are cached: then there is nothing to pick out.
        if lowest == HOLDER:
            self._free_up(block_ids if highest == HOLDER else block_ids[before == HOLDER])
        if lowest <= HOLDER + NAMED <= highest:
            unheld = block_ids if lowest == highest else block_ids[before == HOLDER + NAMED]
            if len(unheld):
                self.policy.add(unheld)

    def name(self, block_ids: BlockIds) -> None:
        """Note that the prefix cache now knows these blocks, all of them held and not yet named. O(n)."""
        self._state[block_ids] += NAMED

    def unname(self, block_ids: BlockIds) -> None:
        """Note that the prefix cache forgot these named blocks; those without a holder become free. O(n)."""
        before = self._state[block_ids]
        unheld = block_ids[before == NAMED]
        if len(unheld):
            self.policy.remove(unheld)
            self._free_up(unheld)
        self._state[block_ids] = before - NAMED
        if self.policy.tracks_names:
            self.policy.on_unname(block_ids)

    def order(self) -> list[int]:
        """Blocks that nobody holds, in the order in which they would go out. O(n)."""
        return [*self._free[: self._num_free][::-1].tolist(), *self.policy.order()]

    def check_invariants(self) -> None:
        """Recount the pool from its tables. Raises InvariantViolation (I2). O(num_blocks)."""
        free, evictable = self._free[: self._num_free], np.array(list(self.policy.order()), np.int32)
        num_listed = np.bincount(np.concatenate((free, evictable)), minlength=self.num_blocks)
        is_unheld = self._state < HOLDER
        if not (num_listed == is_unheld).all():
            wrong = np.flatnonzero(num_listed != is_unheld)[:20]
            raise InvariantViolation(
                "I2",
                f"blocks {wrong.tolist()} are unheld or listed as such {num_listed[wrong].tolist()} times, not both",
            )
        if self._state[free].any() or (self._state[evictable] != NAMED).any():
            raise InvariantViolation("I2", "a free block has a name or a holder, or an evictable one has none")
        if len(evictable) != len(self.policy):
            raise InvariantViolation("I2", f"the policy counts {len(self.policy)} blocks and lists {len(evictable)}")
        self.policy.check_invariants()

    def check_some(self) -> None:
        """Sums that must hold, and the next free block. Raises InvariantViolation (I2). O(1)."""
        num_free, num_evictable = self._num_free, len(self.policy)
        if num_free < 0 or num_free + num_evictable > self.num_blocks:
            raise InvariantViolation("I2", f"{num_free} free and {num_evictable} evictable of {self.num_blocks} blocks")
        if num_free and self._state[self._free[num_free - 1]]:
            raise InvariantViolation("I2", f"block {self._free[num_free - 1]} is free, but has a holder or a name")

    def _free_up(self, block_ids: BlockIds) -> None:
        # The deepest comes first, so pushing in this order lets runs go out again in ascending order,
        # which is what keeps later copies and swaps mergeable.
        num_free = self._num_free + len(block_ids)
        self._free[self._num_free : num_free] = block_ids
        self._num_free = num_free

    def _evict(self, num_blocks: int) -> BlockIds:
        block_ids = self.policy.evict(num_blocks)
        if self.on_evict is not None:
            self.on_evict(block_ids)
        return block_ids

    def _check_ids(self, block_ids: BlockIds) -> BlockIds:
        """Return the ids as int64; BlockStateError unless they are distinct and of this pool. O(n log n) beyond 128."""
        if not isinstance(block_ids, np.ndarray) or block_ids.dtype.kind != "i" or block_ids.ndim != 1:
            raise BlockStateError(f"block ids must be one row in an integer array, found {block_ids!r:.80}")
        num = len(block_ids)
        if num == 0:
            return NO_BLOCKS
        if num <= 128:  # As for `FEW`, but sorting costs more.
            ids = set(block_ids.tolist())
            num_distinct, lowest, highest = len(ids), min(ids), max(ids)
        else:
            ordered = np.sort(block_ids)
            num_distinct = num - int(np.count_nonzero(ordered[1:] == ordered[:-1]))
            lowest, highest = ordered[0], ordered[-1]
        if lowest < 0 or highest >= self.num_blocks:
            raise BlockStateError(f"block ids must be in 0..{self.num_blocks - 1}, found {block_ids.tolist()[:20]}")
        if num_distinct != num:
            raise BlockStateError(f"a block is named twice in one call: {block_ids.tolist()[:20]}")
        return block_ids.astype(np.int64, copy=False)
