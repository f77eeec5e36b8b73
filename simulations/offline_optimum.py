"""The most hits that any policy could have: what the regret of a policy is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s, as_int
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.simulations.cache_pass import CachePass

__all__ = ["offline_optimum"]


def offline_optimum(content_ids: Iterable[NDArray[np.int64]], capacity: int) -> CachePass:
    """Replay a trace as `replay_cache` does, with the policy MIN, which knows the future.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966:
    evict what is used again last. A block that would itself be used last, or never again, is not inserted; that is
    what makes MIN an upper bound for policies that leave blocks out, as all do with a request larger than the cache.

    What is kept always is whole prefixes, since every request that uses a block uses its head just before it; so a hit
    is in the leading run here as well. O(n log n) for n lookups. Raises InvalidArgumentError for a capacity out of range.

    >>> requests = [np.array([1]), np.array([2]), np.array([3]), np.array([1]), np.array([2])]
    >>> offline_optimum(requests, capacity=1).num_hits
    1
    """
    capacity = as_int("capacity", capacity, at_least=0, at_most=MAX_NUM_BLOCKS)
    requests = list(content_ids)
    next_uses = _next_uses(np.concatenate([np.empty(0, np.int64), *requests]))
    num_lookups = len(next_uses)
    # A block that is kept is known by the place of its next use, which is nobody else's. Places that have passed
    # never surface: the heap gives the last place first.
    is_kept = bytearray(num_lookups)
    last_first: list[int] = []
    num_kept = num_hits = 0
    for place, next_use in enumerate(next_uses.tolist()):
        if is_kept[place]:
            num_hits += 1
            num_kept -= 1
        if next_use < num_lookups:
            is_kept[next_use] = True
            heappush(last_first, -next_use)
            num_kept += 1
            if num_kept > capacity:
                is_kept[-heappop(last_first)] = False
                num_kept -= 1
    return CachePass(
        policy="min",
        capacity=capacity,
        num_requests=len(requests),
        num_lookups=num_lookups,
        num_hits=num_hits,
    )


def _next_uses(ids: Int64s) -> Int64s:
    """For each place the next place with the same id; `len(ids)` for the last one. O(n log n)."""
    num = len(ids)
    by_id = np.argsort(ids, kind="stable")
    is_followed = ids[by_id[1:]] == ids[by_id[:-1]]
    next_uses = np.full(num, num, np.int64)
    next_uses[by_id[:-1][is_followed]] = by_id[1:][is_followed]
    return next_uses
