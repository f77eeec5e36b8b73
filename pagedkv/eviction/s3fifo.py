"""S3-FIFO: a small queue on probation, a main queue, and a memory of what the small one let go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key
from pagedkv.errors import ConfigError, InvariantViolation
from pagedkv.eviction.leaf_first import LeafFirst
from pagedkv.eviction.leaf_heap import LeafHeap

__all__ = ["S3FIFO"]

MAX_FREQUENCY = 3
"""Hits that a block remembers: two bits (section 4.1 of the paper)."""

PROMOTING_FREQUENCY = 2
"""Hits that take a block from the small queue to the main one: "accessed more than once" (section 4.1)."""


class S3FIFO(LeafFirst):
    """Evict what is not hit again soon: new blocks prove themselves in a small queue before they may stay in the main one.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1. A newly named block
    enters the small queue, or the main queue if its key is in the ghost queue. Hits are counted up to 3. While the small
    queue holds at least its share of the pool, the victim comes from it, otherwise from the main queue:

    - the oldest block of the small queue moves to the new end of the main queue if it was hit at least twice, and its
      count starts again; otherwise it is the victim, and its key enters the ghost queue;
    - the oldest block of the main queue moves to its new end if it was hit at all, one hit poorer; otherwise it is the
      victim.

    The ghost queue remembers as many keys as the main queue has blocks, the latest ones. Three adaptations:

    - *Held blocks and inner blocks* keep their places and their counts: the oldest block is always the oldest evictable
      leaf of the queue, and the other queue is taken if it has none. Both queues' sizes count all named blocks.
    - *One victim at a time.* Which queue it comes from is decided anew after every move. The paper also takes one from
      an overfull main queue when a block moves there, and then goes on to evict one from the small queue; here the
      main queue's turn is the next, as the small queue is then below its share.
    - The small queue's share is rounded down to whole blocks, and is at least one.

    A move is paid for by a hit: O(log n) amortised for each block. 42 bytes a block, and heaps, keys and ghosts.
    """

    __slots__ = (
        "_frequencies",
        "_ghost",
        "_is_small",
        "_keys",
        "_main",
        "_max_ghosts",
        "_num_small",
        "_share",
        "_small",
        "_small_share",
        "_view_frequencies",
        "_view_is_small",
    )

    name = "s3-fifo"

    def __init__(self, num_blocks: int, *, small_share: float = 0.1) -> None:
        if not 0.0 < small_share < 1.0:
            raise ConfigError(f"small_share must lie between 0 and 1, found {small_share!r}")
        super().__init__(num_blocks)
        self._small_share = small_share
        self._share = max(1, int(small_share * num_blocks))
        self._max_ghosts = max(0, num_blocks - self._share)
        self._small = LeafHeap(self._tree)
        self._main = LeafHeap(self._tree)
        self._num_small = 0
        self._is_small = np.zeros(num_blocks, np.bool_)
        self._view_is_small = self._is_small.data
        self._frequencies = np.zeros(num_blocks, np.int8)
        self._view_frequencies = self._frequencies.data
        self._keys = np.empty(num_blocks, object)
        # Not a dict: taking the oldest key out of one means searching past the gaps that others left before it.
        self._ghost: OrderedDict[Key, None] = OrderedDict()

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        """Put each block at the new end of the small queue, or of the main one if its key is remembered. O(n)."""
        super().on_name(block_ids, keys, parent_ids)
        self._frequencies[block_ids] = 0
        self._keys[block_ids] = keys
        ghost = self._ghost
        if ghost.keys().isdisjoint(keys):
            self._is_small[block_ids] = True
            self._num_small += len(block_ids)
            return
        is_small = [key not in ghost for key in keys]
        self._is_small[block_ids] = is_small
        self._num_small += sum(is_small)
        for key in keys:
            ghost.pop(key, None)

    def on_hit(self, block_ids: BlockIds) -> None:
        """Count the hit, up to 3. O(n)."""
        self._frequencies[block_ids] = np.minimum(self._frequencies[block_ids] + 1, MAX_FREQUENCY)

    def _offer(self, block_id: int) -> None:
        queue = self._small if self._view_is_small[block_id] else self._main
        queue.push(block_id, self._view_numbers[block_id])

    def _next_victim(self) -> int:
        frequencies = self._view_frequencies
        while True:
            block_id = self._oldest_leaf()
            frequency = frequencies[block_id]
            if self._view_is_small[block_id]:
                self._num_small -= 1
                if frequency < PROMOTING_FREQUENCY:
                    self._remember(self._keys[block_id])
                    return block_id
                self._view_is_small[block_id] = False
                frequencies[block_id] = 0
            else:
                if frequency == 0:
                    return block_id
                frequencies[block_id] = frequency - 1
            self._view_numbers[block_id] = self._next_number
            self._main.push(block_id, self._next_number)
            self._next_number += 1

    def _oldest_leaf(self) -> int:
        """Take the oldest evictable leaf out of the queue whose turn it is, or else out of the other."""
        queues = (self._small, self._main) if self._num_small >= self._share else (self._main, self._small)
        for queue in queues:
            block_id = queue.pop()
            if block_id is not None:
                return block_id
        raise self._no_leaf()

    def _remember(self, key: Key) -> None:
        self._ghost[key] = None
        if len(self._ghost) > self._max_ghosts:
            self._ghost.popitem(last=False)

    def _discard(self, block_ids: BlockIds) -> None:
        self._small.discard(block_ids)
        self._main.discard(block_ids)
        self._num_small -= int(np.count_nonzero(self._is_small[block_ids]))

    def _copy(self) -> Self:
        other = type(self)(self._tree.num_blocks, small_share=self._small_share)
        self._copy_order_to(other)
        other._small = self._small.copy(other._tree)
        other._main = self._main.copy(other._tree)
        other._num_small = self._num_small
        other._is_small[:] = self._is_small
        other._frequencies[:] = self._frequencies
        other._keys[:] = self._keys
        other._ghost = self._ghost.copy()
        return other

    def _check_tables(self) -> None:
        leaves = self._tree.leaves()
        is_small = self._is_small[leaves]
        for heap, side in ((self._small, is_small), (self._main, ~is_small)):
            heap.check_invariants()
            if not np.array_equal(heap.numbers(leaves[side]), self._numbers[leaves[side]]):
                raise InvariantViolation("I2", "an evictable leaf is missing from its S3-FIFO queue")
        named = self._tree.named()
        num_small = int(np.count_nonzero(self._is_small[named]))
        if num_small != self._num_small:
            raise InvariantViolation("I2", f"S3-FIFO counts {self._num_small} blocks in its small queue of {num_small}")
        if len(self._ghost) > self._max_ghosts or not self._ghost.keys().isdisjoint(self._keys[named].tolist()):
            raise InvariantViolation("I3", "the ghost queue of S3-FIFO is too long, or remembers a block that is named")
