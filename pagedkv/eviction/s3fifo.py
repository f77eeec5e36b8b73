"""S3-FIFO: a small queue on probation, a main queue, and a memory of what the small one threw out."""

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
"""Hits that are remembered: two bits (section 4.1 of the paper)."""


class S3FIFO(LeafFirst):
    def __init__(self, num_blocks: int, *, small_share: float = 0.1) -> None:
        if not 0.0 < small_share < 1.0:
            raise ConfigError(f"small_share must lie between 0 and 1, found {small_share!r}")
        super().__init__(num_blocks)
        self._small_share = small_share
        self._small_size = max(1, int(small_share * num_blocks))
        self._ghost_size = max(0, num_blocks - self._small_size)
        self._small = LeafHeap(self._tree)
        self._main = LeafHeap(self._tree)
        self._num_small = 0
        self._is_small = np.zeros(num_blocks, np.bool_)
        self._frequency = np.zeros(num_blocks, np.int8)
        self._view_frequency = self._frequency.data
        self._view_is_small = self._is_small.data
        self._keys = np.empty(num_blocks, object)
        self._ghost: OrderedDict[Key, None] = OrderedDict()

    name = "s3-fifo"

    def on_name(self, block_ids: BlockIds, keys: Sequence[Key], parent_ids: BlockIds) -> None:
        super().on_name(block_ids, keys, parent_ids)
        self._frequency[block_ids] = 0
        self._keys[block_ids] = keys
        ghost = self._ghost
        is_small = np.array([key not in ghost for key in keys], np.bool_)
        for key in keys:
            ghost.pop(key, None)
        self._is_small[block_ids] = is_small
        self._num_small += int(np.count_nonzero(is_small))

    def on_hit(self, block_ids: BlockIds) -> None:
        self._frequency[block_ids] = np.minimum(self._frequency[block_ids] + 1, MAX_FREQUENCY)

    def _offer(self, block_id: int) -> None:
        queue = self._small if self._view_is_small[block_id] else self._main
        queue.push(block_id, self._view_numbers[block_id])

    def _next_victim(self) -> int:
        while True:
            first, second = (self._small, self._main) if self._num_small >= self._small_size else (self._main, self._small)
            block_id = first.pop()
            if block_id is None:
                block_id = second.pop()
            if block_id is None:
                raise InvariantViolation("I7", "no evictable leaf is left for S3-FIFO")
            is_small = self._view_is_small[block_id]
            f = self._view_frequency[block_id]
            if is_small:
                self._num_small -= 1
                if f <= 1:
                    self._ghost[self._keys[block_id]] = None
                    if len(self._ghost) > self._ghost_size:
                        self._ghost.popitem(last=False)
                    return block_id
                self._view_is_small[block_id] = False
                self._view_frequency[block_id] = 0
            else:
                if f == 0:
                    return block_id
                self._view_frequency[block_id] = f - 1
            self._view_numbers[block_id] = self._next_number
            self._next_number += 1
            self._main.push(block_id, self._view_numbers[block_id])

    def _discard(self, block_ids):
        self._small.discard(block_ids)
        self._main.discard(block_ids)
        self._num_small -= int(np.count_nonzero(self._is_small[block_ids]))

    def _copy(self) -> Self: ...
    def check_invariants(self): ...
