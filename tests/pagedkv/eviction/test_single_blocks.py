"""With single blocks (no prefixes, nothing held), our policies miss exactly as often as the plain algorithms.

The oracles are textbook Python and share nothing with the code under test. One reference at a time; a miss inserts.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial

import numpy as np
import pytest

from pagedkv.eviction import POLICY_NAMES, make_policy
from pagedkv.simulations.cache_pass import replay_cache
from pagedkv.simulations.offline_optimum import offline_optimum


def drifting_references(num: int, num_blocks: int, seed: int) -> list[int]:
    """Zipf popularity whose ranks move on over time, with a scan of fresh blocks now and then."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_blocks + 1) ** -0.9
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(num))
    blocks = (ranks + np.arange(num) // 40) % num_blocks
    is_scan = np.arange(num) % 2000 < 150
    return np.where(is_scan, num_blocks + np.arange(num), blocks).tolist()


def lru_misses(references, capacity):
    cache, misses = OrderedDict(), 0
    for x in references:
        if x in cache:
            cache.move_to_end(x)
            continue
        misses += 1
        if len(cache) == capacity:
            cache.popitem(last=False)
        cache[x] = None
    return misses


def fifo_misses(references, capacity):
    cache, misses = OrderedDict(), 0
    for x in references:
        if x not in cache:
            misses += 1
            if len(cache) == capacity:
                cache.popitem(last=False)
            cache[x] = None
    return misses


class Node:
    def __init__(self, x):
        self.x, self.visited, self.newer, self.older = x, False, None, None


def sieve_misses(references, capacity):
    """Algorithm 1 of the paper, with its linked list."""
    nodes, newest, oldest, hand, misses = {}, None, None, None, 0
    for x in references:
        if x in nodes:
            nodes[x].visited = True
            continue
        misses += 1
        if len(nodes) == capacity:
            node = hand or oldest
            while node.visited:
                node.visited = False
                node = node.newer or oldest
            hand = node.newer
            if node.newer:
                node.newer.older = node.older
            else:
                newest = node.older
            if node.older:
                node.older.newer = node.newer
            else:
                oldest = node.newer
            del nodes[node.x]
        node = nodes[x] = Node(x)
        node.older = newest
        if newest:
            newest.newer = node
        else:
            oldest = node
        newest = node
    return misses


def s3fifo_misses(references, capacity):
    """Algorithm 1 of the paper, with one victim an eviction."""
    small, main, ghost, hits, misses = deque(), deque(), deque(), {}, 0
    share = max(1, capacity // 10)
    for x in references:
        if x in hits:
            hits[x] = min(hits[x] + 1, 3)
            continue
        misses += 1
        victim = None
        while len(hits) == capacity and victim is None:
            if len(small) >= share or not main:
                t = small.popleft()
                if hits[t] > 1:
                    hits[t] = 0
                    main.append(t)
                else:
                    victim = t
                    ghost.append(t)
                    if len(ghost) > capacity - share:
                        ghost.popleft()
            else:
                t = main.popleft()
                if hits[t] > 0:
                    hits[t] -= 1
                    main.append(t)
                else:
                    victim = t
        hits.pop(victim, None)
        if x in ghost:
            ghost.remove(x)
            main.append(x)
        else:
            small.append(x)
        hits[x] = 0
    return misses


def min_misses(references, capacity):
    """Belady's MIN: evict what is used again last; a block that would be that itself is not inserted."""
    uses = {}
    for place, x in enumerate(references):
        uses.setdefault(x, deque()).append(place)
    cache, misses = set(), 0
    for x in references:
        uses[x].popleft()
        misses += x not in cache
        cache.add(x)
        if len(cache) > capacity:
            cache.remove(max(cache, key=lambda y: (uses[y][0] if uses[y] else len(references), y)))
    return misses


ORACLES = {"lru": lru_misses, "fifo": fifo_misses, "s3-fifo": s3fifo_misses, "sieve": sieve_misses}

GOLDEN = {
    ("lru", 20): 15_740,
    ("lru", 200): 8_733,
    ("fifo", 20): 16_242,
    ("fifo", 200): 9_451,
    ("s3-fifo", 20): 15_000,
    ("s3-fifo", 200): 8_234,
    ("sieve", 20): 15_859,
    ("sieve", 200): 9_535,
}


def our_misses(name, references, capacity):
    requests = np.array(references, np.int64).reshape(-1, 1)
    result = replay_cache(requests, capacity, partial(make_policy, name))
    return result.num_lookups - result.num_hits


def our_min_misses(references, capacity):
    result = offline_optimum(np.array(references, np.int64).reshape(-1, 1), capacity)
    return result.num_lookups - result.num_hits


@pytest.fixture(scope="module")
def references():
    return drifting_references(20_000, 800, seed=1)


@pytest.mark.parametrize(("name", "capacity"), GOLDEN)
def test_misses_are_those_of_the_plain_algorithm(references, name, capacity):
    assert ORACLES[name](references, capacity) == GOLDEN[name, capacity]
    assert our_misses(name, references, capacity) == GOLDEN[name, capacity]


@pytest.mark.parametrize(("capacity", "misses"), [(20, 11_345), (200, 5_047)])
def test_misses_of_the_offline_optimum_are_those_of_plain_min(references, capacity, misses):
    assert min_misses(references, capacity) == misses
    assert our_min_misses(references, capacity) == misses


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 13])
def test_tiny_caches_miss_as_often_as_the_plain_algorithm_and_no_less_than_min(name, capacity):
    for seed in range(3):
        few = drifting_references(700, 16, seed)
        misses = our_misses(name, few, capacity)
        assert misses == ORACLES[name](few, capacity)
        assert misses >= our_min_misses(few, capacity) == min_misses(few, capacity)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_long_traces_miss_as_often_as_the_plain_algorithm(name, seed):
    many = drifting_references(200_000, 5_000, seed)
    misses = our_misses(name, many, 600)
    assert misses == ORACLES[name](many, 600)
    assert misses > our_min_misses(many, 600)
