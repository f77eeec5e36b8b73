"""F14: golden miss counts of three traces of single blocks, the same from our policies and from plain models.

The models are a few lines of Python each and share nothing with the code under test, nor with those of
test_single_blocks.py. The counts stand here as text, so that neither side can drift with the other.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest

from pagedkv.eviction import make_policy
from pagedkv.simulations.cache_pass import replay_cache
from pagedkv.simulations.offline_optimum import offline_optimum


def zipf_ranks(rng: np.random.Generator, num: int, num_blocks: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, num_blocks + 1) ** -exponent
    return np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(num))


def drifting(num: int) -> np.ndarray:
    """Popularity whose ranks move on: what was hot an hour ago is not now. Scans of new blocks in between."""
    ranks = zipf_ranks(np.random.default_rng(11), num, 20_000, 0.9)
    blocks = (ranks + np.arange(num) // 60) % 20_000
    return np.where(np.arange(num) % 5000 < 400, 20_000 + np.arange(num), blocks)


def steady(num: int) -> np.ndarray:
    """Popularity that stays as it is, with scans: here policies that spare the popular are the better ones."""
    ranks = zipf_ranks(np.random.default_rng(12), num, 20_000, 1.0)
    return np.where(np.arange(num) % 3000 < 500, 20_000 + np.arange(num), ranks)


def looping(num: int) -> np.ndarray:
    """Working sets, each gone through again and again and then left for the next: the worst case of LRU."""
    place = np.arange(num)
    return place // 30_000 * 700 + place % 1100 + np.random.default_rng(13).integers(0, 3, num)


TRACES: dict[str, Callable[[int], np.ndarray]] = {"drifting": drifting, "steady": steady, "looping": looping}


@cache
def references(name: str, num: int) -> tuple[int, ...]:
    return tuple(TRACES[name](num).tolist())


def lru(blocks, capacity):
    last_use, misses, clock = OrderedDict(), 0, 0
    for clock, block in enumerate(blocks):
        if block in last_use:
            del last_use[block]
        else:
            misses += 1
            if len(last_use) == capacity:
                del last_use[next(iter(last_use))]
        last_use[block] = clock
    return misses


def fifo(blocks, capacity):
    queue, resident, misses = deque(), set(), 0
    for block in blocks:
        if block not in resident:
            misses += 1
            if len(resident) == capacity:
                resident.remove(queue.popleft())
            queue.append(block)
            resident.add(block)
    return misses


def sieve(blocks, capacity):
    """The queue as two stacks: `below`, older than the hand, spared; `above`, from the hand on to the newest."""
    below, above, visited, misses = [], deque(), {}, 0
    for block in blocks:
        if block in visited:
            visited[block] = True
            continue
        misses += 1
        if len(visited) == capacity:
            while visited[above[0]]:
                visited[above[0]] = False
                below.append(above.popleft())
                if not above:  # The hand passed the newest: it goes on at the oldest.
                    above, below = deque(below), []
            del visited[above.popleft()]
            if not above:
                above, below = deque(below), []
        visited[block] = False
        above.append(block)
    return misses


def optimum(blocks, capacity):
    """MIN: of all that is resident, and what has just come, that goes which is used again last."""
    next_use, later = [0] * len(blocks), {}
    for place in range(len(blocks) - 1, -1, -1):
        next_use[place] = later.get(blocks[place], len(blocks) + place)
        later[blocks[place]] = place
    resident, farthest, misses = {}, [], 0
    for place, block in enumerate(blocks):
        misses += block not in resident
        resident[block] = next_use[place]
        heapq.heappush(farthest, (-next_use[place], block))
        while len(resident) > capacity:
            use, candidate = heapq.heappop(farthest)
            if resident.get(candidate) == -use:
                del resident[candidate]
    return misses


MODELS = {"lru": lru, "fifo": fifo, "sieve": sieve, "min": optimum}


def ours(name: str, blocks: tuple[int, ...], capacity: int) -> int:
    requests = np.array(blocks, np.int64).reshape(-1, 1)
    if name == "min":
        result = offline_optimum(requests, capacity)
    else:
        result = replay_cache(requests, capacity, partial(make_policy, name))
    return result.num_lookups - result.num_hits


# (trace, references, capacity): misses by policy
GOLDEN = {
    ("drifting", 15_000, 1000): {"lru": 8_806, "fifo": 9_271, "sieve": 8_419, "min": 6_709},
    ("steady", 15_000, 1000): {"lru": 7_939, "fifo": 8_328, "sieve": 7_379, "min": 6_401},
    ("looping", 15_000, 800): {"lru": 3_684, "fifo": 6_417, "sieve": 4_959, "min": 2_204},
}
LONG = {
    ("drifting", 2_000_000, 1500): {"lru": 1_079_168, "fifo": 1_149_337, "sieve": 1_145_497, "min": 690_280},
    ("steady", 300_000, 1500): {"lru": 146_037, "fifo": 157_395, "sieve": 121_209, "min": 100_413},
    ("looping", 300_000, 800): {"lru": 68_766, "fifo": 125_209, "sieve": 90_413, "min": 33_288},
}


def rows(golden: dict) -> list[tuple]:
    return [(*case, policy, misses) for case, counts in golden.items() for policy, misses in counts.items()]


@pytest.mark.parametrize(("trace", "num", "capacity", "policy", "misses"), rows(GOLDEN))
def test_misses_are_the_golden_ones(trace: str, num: int, capacity: int, policy: str, misses: int) -> None:
    blocks = references(trace, num)

    assert (ours(policy, blocks, capacity), MODELS[policy](blocks, capacity)) == (misses, misses)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("trace", "num", "capacity", "policy", "misses"), rows(LONG))
def test_misses_of_long_traces_are_the_golden_ones(
    trace: str, num: int, capacity: int, policy: str, misses: int
) -> None:
    blocks = references(trace, num)

    assert (ours(policy, blocks, capacity), MODELS[policy](blocks, capacity)) == (misses, misses)


def test_the_traces_tell_the_policies_apart() -> None:
    for counts in (*GOLDEN.values(), *LONG.values()):
        assert len(set(counts.values())) == 4
        assert counts["min"] == min(counts.values())
