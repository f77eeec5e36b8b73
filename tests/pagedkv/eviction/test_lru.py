"""LRU: order of letting go, which makes leaves go first by itself."""

import pytest

from pagedkv import InvariantViolation
from pagedkv.eviction import LRU


def test_the_block_let_go_first_goes_first(chains):
    cache = chains(LRU(3), 3)
    cache.use("a", "b", "c")
    assert cache.order == ["a", "b", "c"]


def test_a_hit_moves_a_block_to_the_end(chains):
    cache = chains(LRU(3), 3)
    cache.use("a", "b", "a")
    assert cache.order == ["b", "a"]


def test_a_branch_goes_from_tail_to_head(chains):
    cache = chains(LRU(4), 4)
    cache.use("abc", "x")
    assert cache.order == ["abc", "ab", "a", "x"]


def test_a_shared_head_moves_with_its_latest_use(chains):
    cache = chains(LRU(4), 4)
    cache.use("ab", "x", "ac")
    assert cache.order == ["ab", "x", "ac", "a"]


def test_a_hit_on_the_head_alone_leaves_its_tail_behind(chains):
    cache = chains(LRU(3), 3)
    cache.use("ab", "x", "a")
    assert cache.order == ["ab", "x", "a"]


def test_holes_are_squeezed_out_of_a_full_log(chains):
    cache = chains(LRU(2), 2)
    for _ in range(100):
        cache.use("a", "b")
    assert cache.order == ["a", "b"]


def test_the_recount_finds_a_block_that_was_lost(chains):
    cache = chains(LRU(3), 3)
    cache.use("a", "b")
    cache.pool.policy._log[cache.pool.policy._head] = -1
    with pytest.raises(InvariantViolation, match="I2: LRU counts 2 blocks, its log holds 1"):
        cache.pool.policy.check_invariants()
