"""Somebody else who uses the same memory: takes what the scheduler had counted on, and gives it back unannounced."""

from __future__ import annotations

import numpy as np

from pagedkv.manager import KVCacheManager
from pagedkv.testing.scheduler_shadow import ShadowEngine, states_of

__all__ = ["Neighbour"]


class Neighbour:
    """Opens sequences of its own through the manager, on the device or on the host, and writes their states.

    Its prompts share nothing with the service's, but its full blocks are named and stay behind as evictable ones.
    Without an engine only the bookkeeping is done.
    """

    def __init__(self, manager: KVCacheManager, engine: ShadowEngine | None = None) -> None:
        self._manager = manager
        self._engine = engine
        self._leaves_at: dict[str, int] = {}
        self.num_opened = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def is_there(self) -> bool:
        """Whether it holds anything."""
        return bool(self._leaves_at)

    def take_device(self, until_step: int) -> None:
        """Take every available block but one, until a step. Somebody else must not be in the middle of one."""
        num_blocks = self._manager.memory.pool.num_available - 1
        if num_blocks > 0:
            self._open(num_blocks, until_step)

    def take_host(self, until_step: int) -> None:
        """Take as much of the host pool as can be had through the device."""
        memory = self._manager.memory
        num_blocks = min(memory.host_pool.num_available, memory.pool.num_available)
        if num_blocks > 0:
            sequence_id = self._open(num_blocks, until_step)
            copies = self._manager.swap_out(sequence_id)
            if self._engine is not None:
                self._engine.host[copies.targets] = self._engine.device[copies.sources]

    def leave(self, step: int | None = None) -> None:
        """Close what was to be held until this step; everything without one."""
        for sequence_id, until in list(self._leaves_at.items()):
            if step is None or until <= step:
                self._manager.close(sequence_id)
                del self._leaves_at[sequence_id]

    def _open(self, num_blocks: int, until_step: int) -> str:
        self.num_opened += 1
        sequence_id = f"neighbour {self.num_opened}"
        num_tokens = num_blocks * self._manager.config.block_size
        tokens = [self.num_opened % 1000 + 1000, *([7] * (num_tokens - 1))]
        hit = self._manager.open(sequence_id, tokens, salt=b"neighbour")
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += hit
        slots = self._manager.append(sequence_id, num_tokens - hit).slots
        if self._engine is not None:
            self._engine.slots[slots] = np.array(states_of(tokens), np.uint64)[hit:]
        self._leaves_at[sequence_id] = until_step
        return sequence_id
