"""A fingerprint of everything that a memory promises to keep when an operation fails."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from pagedkv.manager import KVCacheManager

__all__ = ["state_digest"]


def state_digest(manager: KVCacheManager) -> str:
    """Fingerprint of holders, names, tables, host blocks and counters, as 16 hex digits. O(blocks + tokens of last blocks).

    Left out is the order of free and of evictable blocks: which block goes out next is a heuristic, not a promise, and a
    swap in that fails has looked at what it would have hit.
    """
    memory, table = manager.memory, manager.memory.sequences
    memory.naming.catch_up()  # What waits for its name is found as if it had it.
    digest = sha256()
    for pool in (memory.pool, memory.host_pool):
        ids = np.arange(pool.num_blocks)
        digest.update(pool.counts(ids).tobytes() + pool.is_named(ids).tobytes())
        digest.update(repr((pool.num_free, pool.num_evictable, sorted(pool.order()))).encode())
    digest.update(repr(memory.cache.keys_of(np.arange(memory.pool.num_blocks))).encode())
    for row in np.flatnonzero(table.is_live).tolist():
        columns = (table.num_known, table.num_computed, table.num_blocks, table.num_drafts, table.num_named)
        digest.update(repr((row, [int(column[row]) for column in columns], table.has_shared_tail[row])).encode())
        digest.update(table.blocks(row).tobytes())
        digest.update(repr(memory.host_blocks.get(row, table.blocks(row)[:0]).tolist()).encode())
        start = int(table.num_known[row] - 1) // memory.block_size * memory.block_size
        places = np.arange(start, int(table.num_known[row])) % (2 * memory.block_size)
        digest.update(table.tails[row, places].tobytes())
    digest.update(repr((memory.counters, len(manager), table.num_live)).encode())
    return digest.hexdigest()[:16]
