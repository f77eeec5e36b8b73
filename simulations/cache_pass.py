"""What a prefix cache of a given size and policy would hit on a trace, without simulating anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedkv import BlockPool, PrefixCache
from pagedkv.arrays import as_int
from pagedkv.block_keys import Key
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.errors import InvalidArgumentError
from pagedkv.eviction import LRU, EvictionPolicy

__all__ = ["CachePass", "replay_cache"]

NO_PARENT = np.array([-1], np.int64)


@dataclass(frozen=True, slots=True)
class CachePass:
    """The outcome of one pass: `policy` by name, `capacity`, lookups and hits in blocks."""

    policy: str
    capacity: int
    num_requests: int
    num_lookups: int
    num_hits: int

    @property
    def hit_ratio(self) -> float:
        """Hits by lookups; 0 if there was no lookup."""
        return self.num_hits / self.num_lookups if self.num_lookups else 0.0


def replay_cache(
    content_ids: Iterable[NDArray[np.int64]], capacity: int, policy: Callable[[int], EvictionPolicy] = LRU
) -> CachePass:
    """Look up and insert the requests of a trace, one after the other, in a prefix cache of `capacity` blocks.

    content_ids: for each request (n,) int64, its prefix ids: equal id means equal block and equal blocks before it
    policy:      makes the policy for a pool of so many blocks: a class such as `LRU`, or a `functools.partial`

    For each request: its hits are the leading run of resident blocks; its other blocks are then inserted, and all of
    its blocks count as used, tail before head. Only while that goes on are its blocks safe from eviction; nothing is
    pinned between requests. A request with more blocks than the cache evicts all others and inserts the front of its
    prompt, as much as fits: a block without its head could never be hit.

    This drives BlockPool and PrefixCache themselves, as the memory manager does. O(blocks), times the policy's cost;
    about 30 us a request with LRU. Raises InvalidArgumentError for a capacity out of range, and for ids that are found
    not to be prefix ids.

    >>> requests = [np.array([1, 2]), np.array([1, 2, 3]), np.array([4]), np.array([1, 2, 3])]
    >>> replay_cache(requests, capacity=4).num_hits
    5
    >>> replay_cache(requests, capacity=3).num_hits
    4
    """
    capacity = as_int("capacity", capacity, at_least=0, at_most=MAX_NUM_BLOCKS)
    pool = BlockPool(capacity, policy(capacity))
    cache = PrefixCache(pool)
    num_requests = num_lookups = num_hits = 0
    for ids in content_ids:
        num_hit = _serve(pool, cache, ids.tolist())
        if num_hit is None:
            raise InvalidArgumentError(f"request {num_requests}: an id is there twice, or follows another id elsewhere")
        num_requests += 1
        num_lookups += len(ids)
        num_hits += num_hit
    return CachePass(
        policy=pool.policy.name,
        capacity=capacity,
        num_requests=num_requests,
        num_lookups=num_lookups,
        num_hits=num_hits,
    )


def _serve(pool: BlockPool, cache: PrefixCache, keys: list[Key]) -> int | None:
    """Look up one request, insert it, and let go of it. Returns its hits, or None if its keys are no prefix ids."""
    num_keys = len(keys)
    num_hit = cache.num_resident(keys, num_keys)
    hits = cache.blocks(keys, num_hit)
    if len(hits) < num_hit:
        return None
    if num_hit:
        pool.acquire(hits)
    num_new = min(num_keys - num_hit, pool.num_available)
    new = pool.allocate(num_new)
    chain = np.concatenate((NO_PARENT, hits, new))
    if num_new:
        num_named = len(cache) + num_new
        cache.name_fresh(keys[num_hit : num_hit + num_new], new, chain[num_hit:-1])
        if len(cache) != num_named:
            return None
    pool.release(chain[:0:-1])
    return num_hit
