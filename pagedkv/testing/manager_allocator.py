"""KVCacheManager as an allocator under test: the adapter that any engine would write for its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields
from operator import attrgetter

import numpy as np

from pagedkv.config import CacheConfig
from pagedkv.manager import KVCacheManager
from pagedkv.plans import BlockCopies
from pagedkv.statistics import PrefixCounters
from pagedkv.testing.allocator_protocol import Capabilities, Copies, NewSlots

__all__ = ["ManagerAllocator", "make_allocator"]

COUNTERS = attrgetter(*(field.name for field in fields(PrefixCounters)))
"""The prefix cache's counters as a tuple."""


class ManagerAllocator:
    """The manager's own verbs, with arrays turned into lists."""

    capabilities = Capabilities()

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self._pool, self._host_pool = manager.memory.pool, manager.memory.host_pool
        self._all_ids = [np.arange(pool.num_blocks) for pool in (self._pool, self._host_pool)]

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes) -> int:
        """Tokens hit."""
        return self.manager.open(sequence_id, token_ids, salt=salt)

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """More known tokens."""
        self.manager.extend(sequence_id, token_ids)

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        """Slots for known tokens."""
        slots, copies = self.manager.append(sequence_id, num_tokens)
        return NewSlots(slots.tolist(), pairs(copies))

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        """Share all blocks."""
        self.manager.fork(source_id, sequence_id)

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Drop the last tokens."""
        self.manager.truncate(sequence_id, num_tokens)

    def close(self, sequence_id: Hashable) -> None:
        """End a sequence."""
        self.manager.close(sequence_id)

    def swap_out(self, sequence_id: Hashable) -> Copies:
        """Move to the host."""
        return pairs(self.manager.swap_out(sequence_id))

    def swap_in(self, sequence_id: Hashable) -> Copies:
        """Bring back."""
        return pairs(self.manager.swap_in(sequence_id))

    def lookup(self, token_ids: Sequence[int], *, salt: bytes) -> int:
        """What `open` would hit, pinning nothing: a pin would count as a use, and change the order of eviction."""
        content, num_known = self.manager.make_content(token_ids, salt=salt)
        return self.manager.memory.num_hit_blocks(content, num_known) * self.manager.config.block_size

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        """The table as a list."""
        table: list[int] = self.manager.block_table(sequence_id).tolist()
        return table

    def num_free(self) -> int:
        """Free and evictable."""
        return self._pool.num_available

    def num_free_host(self) -> int:
        """The host pool evicts nothing."""
        return self._host_pool.num_available

    def check(self) -> None:
        """The manager's own recount."""
        self.manager.check_invariants()

    def state(self) -> object:
        """All that the manager knows, as plain values."""
        memory, table = self.manager.memory, self.manager.memory.sequences
        pools = [
            (pool.order(), pool.counts(ids).tolist())
            for pool, ids in zip((self._pool, self._host_pool), self._all_ids, strict=True)
        ]
        live = table.is_live.nonzero()[0]
        columns = (table.num_known, table.num_computed, table.num_blocks, table.num_named, table.has_shared_tail)
        rows = [live.tolist(), *(column[live].tolist() for column in columns)]
        width = max(rows[3], default=0)
        held = [
            block_ids[:num_blocks]
            for block_ids, num_blocks in zip(table.block_tables[live, :width].tolist(), rows[3], strict=True)
        ]
        on_host = {row: block_ids.tolist() for row, block_ids in memory.host_blocks.items()}
        return pools, rows, held, on_host, memory.cache.keys_of(self._all_ids[0]), COUNTERS(memory.counters)


def pairs(copies: BlockCopies) -> Copies:
    """Sources and targets as a list of pairs."""
    if not len(copies):
        return []
    return list(zip(copies.sources.tolist(), copies.targets.tolist(), strict=True))


def make_allocator(num_blocks: int, block_size: int, num_host_blocks: int = 0) -> ManagerAllocator:
    """What `pagedkv verify pagedkv.testing.manager_allocator:make_allocator` tests."""
    return ManagerAllocator(KVCacheManager(CacheConfig(num_blocks, block_size, num_host_blocks)))
