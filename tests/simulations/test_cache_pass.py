"""The cache-only pass against the published figures of a public trace, plain definitions, and the offline optimum."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.errors import InvalidArgumentError
from pagedkv.eviction import FIFO, LRU, POLICY_NAMES, S3FIFO, SIEVE, make_policy
from pagedkv.simulations.cache_pass import CachePass, replay_cache
from pagedkv.simulations.offline_optimum import offline_optimum
from pagedkv.simulations.traces import load_trace

CAPACITIES = [1_000, 5_859, 10_000, 30_000, 50_000, 97_656, 100_000]

# Hit ratios of leaf-first eviction, tail before head, at these capacities; LRU and MIN as published with the trace
# ("LRU, tail blocks older"), the others our own.
HIT_RATIOS = {
    "lru": [0.0445, 0.1361, 0.2116, 0.3257, 0.3546, 0.3635, 0.3637],
    "fifo": [0.0445, 0.1361, 0.2109, 0.3258, 0.3544, 0.3635, 0.3637],
    "s3-fifo": [0.0561, 0.1346, 0.1885, 0.3145, 0.3552, 0.3636, 0.3636],
    "sieve": [0.0462, 0.1180, 0.1671, 0.2756, 0.3173, 0.3542, 0.3551],
    "min": [0.1907, 0.3532, 0.3664, 0.3664, 0.3664, 0.3664, 0.3664],
}

# Published beside them: FIFO block by block, front first, evicting whatever came first, be it the head of a prefix.
PLAIN_FIFO_HIT_RATIOS = [0.0434, 0.1248, 0.1815, 0.2944, 0.3335, 0.3560, 0.3563]


@pytest.fixture(scope="module")
def conversation(shared_trace: Callable[[str], Path]) -> list[np.ndarray]:
    """The content ids of every request of the conversation trace."""
    trace = load_trace(shared_trace("mooncake_fast25_conversation.jsonl.gz"))
    return [trace.content_ids(i) for i in range(len(trace))]


def ids(*requests: list[int]) -> list[np.ndarray]:
    return [np.array(request, np.int64) for request in requests]


def plain_fifo_hit_ratio(requests: list[np.ndarray], capacity: int) -> float:
    """Front first, one block at a time, no matter what continues what; hits are the leading run before that."""
    cache: OrderedDict[int, None] = OrderedDict()
    num_hits = num_lookups = 0
    for request in requests:
        blocks = request.tolist()
        is_resident = [block in cache for block in blocks]
        num_hits += is_resident.index(False) if False in is_resident else len(blocks)
        num_lookups += len(blocks)
        for block in blocks:
            if block not in cache:
                if len(cache) == capacity:
                    cache.popitem(last=False)
                cache[block] = None
    return num_hits / num_lookups


# The public trace


@pytest.mark.parametrize(
    ("name", "capacity_idx"),
    [
        pytest.param(name, i, marks=[] if name == "lru" or i == 1 else pytest.mark.slow)
        for name in POLICY_NAMES
        for i in range(len(CAPACITIES))
    ],
)
def test_hit_ratios_on_the_conversation_trace(conversation, name, capacity_idx):
    result = replay_cache(conversation, CAPACITIES[capacity_idx], partial(make_policy, name))
    assert (result.num_requests, result.num_lookups) == (12_031, 288_500)
    assert round(result.hit_ratio, 4) == HIT_RATIOS[name][capacity_idx]


@pytest.mark.parametrize("capacity_idx", range(len(CAPACITIES)))
def test_optimal_hit_ratios_on_the_conversation_trace(conversation, capacity_idx):
    result = offline_optimum(conversation, CAPACITIES[capacity_idx])
    assert (result.num_requests, result.num_lookups) == (12_031, 288_500)
    assert round(result.hit_ratio, 4) == HIT_RATIOS["min"][capacity_idx]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_cache_that_holds_everything_has_the_ceiling_on_the_conversation_trace(conversation, name):
    assert len(np.unique(np.concatenate(conversation))) == 182_790
    result = replay_cache(conversation, 182_790, partial(make_policy, name))
    assert result.num_hits == 288_500 - 182_790
    assert round(result.hit_ratio, 4) == 0.3664


@pytest.mark.parametrize("capacity_idx", range(len(CAPACITIES)))
def test_fifo_without_the_leaf_rule_has_the_published_hit_ratios(conversation, capacity_idx):
    ratio = plain_fifo_hit_ratio(conversation, CAPACITIES[capacity_idx])
    assert round(ratio, 4) == PLAIN_FIFO_HIT_RATIOS[capacity_idx]


# What the pass is


def test_hits_are_the_leading_run_of_resident_blocks():
    assert replay_cache(ids([1, 2], [1, 2, 3], [1, 4], [5]), capacity=8).num_hits == 2 + 1


def test_a_request_evicts_none_of_its_own_hits():
    assert replay_cache(ids([1], [2], [1, 3], [1, 3]), capacity=2).num_hits == 1 + 2


def test_the_tail_of_a_request_goes_before_its_head():
    assert replay_cache(ids([1, 2], [3], [1]), capacity=2).num_hits == 1


def test_fifo_evicts_a_head_after_its_tail_but_plain_fifo_before():
    requests = ids([1, 2], [3], [1])
    assert replay_cache(requests, 2, FIFO).num_hits == 1
    assert plain_fifo_hit_ratio(requests, 2) == 0


def test_of_a_request_larger_than_the_cache_the_front_is_kept():
    assert replay_cache(ids([1, 2, 3], [1], [1, 2], [1, 2, 3]), capacity=2).num_hits == 1 + 2 + 2


def test_a_request_larger_than_the_cache_evicts_everything_else():
    assert replay_cache(ids([9], [1, 2, 3], [9]), capacity=2).num_hits == 0


def test_a_cache_of_no_blocks_hits_nothing():
    assert replay_cache(ids([1], [1]), capacity=0) == CachePass("lru", 0, num_requests=2, num_lookups=2, num_hits=0)


def test_no_requests_have_a_hit_ratio_of_0():
    assert replay_cache([], capacity=4).hit_ratio == 0.0
    assert offline_optimum([], capacity=4).hit_ratio == 0.0


def test_requests_without_blocks_are_counted():
    assert replay_cache(ids([], [1], []), capacity=1) == CachePass("lru", 1, num_requests=3, num_lookups=1, num_hits=0)


@pytest.mark.parametrize("policy", [LRU, FIFO, S3FIFO, SIEVE])
def test_the_outcome_names_its_policy(policy):
    assert replay_cache([], 4, policy).policy == policy.name


@pytest.mark.parametrize("requests", [ids([1, 2, 1]), ids([1, 2], [3, 2]), ids([1, 2, 3], [1, 9, 3])])
def test_ids_that_name_no_prefixes_are_refused(requests):
    with pytest.raises(InvalidArgumentError, match=f"request {len(requests) - 1}: an id is there twice, or follows"):
        replay_cache(requests, capacity=8)


@pytest.mark.parametrize("run", [replay_cache, offline_optimum])
@pytest.mark.parametrize("capacity", [-1, 2**28 + 1, 1.5, True])
def test_a_capacity_out_of_range_is_refused(run, capacity):
    with pytest.raises(InvalidArgumentError, match="must be"):
        run([], capacity)


# The offline optimum


def test_the_optimum_keeps_what_is_used_again_first():
    assert offline_optimum(ids([1], [2], [3], [1], [2]), capacity=2).num_hits == 2
    assert replay_cache(ids([1], [2], [3], [1], [2]), capacity=2).num_hits == 0


def test_the_optimum_leaves_out_what_is_never_used_again():
    assert offline_optimum(ids([1], [2], [1], [3], [1]), capacity=1).num_hits == 2


prefix_trees = st.lists(st.text(alphabet="abc", max_size=6), max_size=40)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(texts=prefix_trees, capacity=st.integers(0, 12))
def test_no_policy_hits_more_than_the_optimum(texts, capacity):
    number = {}
    requests = [
        np.array([number.setdefault(text[:stop], len(number)) for stop in range(1, len(text) + 1)], np.int64)
        for text in texts
    ]
    most = offline_optimum(requests, capacity).num_hits
    for name in POLICY_NAMES:
        assert replay_cache(requests, capacity, partial(make_policy, name)).num_hits <= most
    assert offline_optimum(requests, len(number)).num_hits == sum(map(len, texts)) - len(number)
