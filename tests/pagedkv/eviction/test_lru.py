"""LRU: order of letting go, which makes leaves go first by itself."""

import numpy as np
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


def test_a_victim_behind_more_holes_than_one_look_covers_is_found():
    policy = LRU(100)
    policy.add(np.arange(100))
    policy.remove(np.arange(99))
    assert policy.evict(1).tolist() == [99]
    policy.check_invariants()
    assert len(policy) == 0


def test_victims_and_holes_leave_the_head_of_the_log_together():
    policy = LRU(100)
    policy.add(np.arange(100))
    policy.remove(np.array([0, 2, 4, 99]))
    assert policy.evict(3).tolist() == [1, 3, 5]
    policy.check_invariants()
    assert (len(policy), list(policy.order())) == (93, list(range(6, 99)))


def test_the_log_has_room_for_every_block_at_any_time():
    policy = LRU(200)
    for _ in range(5):
        policy.add(np.arange(200))
        assert policy.evict(200).tolist() == list(range(200))
    policy.check_invariants()


def test_squeezing_a_full_log_keeps_the_order_and_where_each_block_stands():
    policy = LRU(100)
    for _ in range(5):  # 264 places: the third round finds the log full.
        policy.add(np.arange(0, 100, 2))
        policy.add(np.arange(1, 100, 2))
        policy.remove(np.arange(10, 100))
        policy.check_invariants()
        assert policy.evict(10).tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def test_the_recount_finds_a_block_that_was_lost(chains):
    cache = chains(LRU(3), 3)
    cache.use("a", "b")
    cache.pool.policy._log[cache.pool.policy._head] = -1
    with pytest.raises(InvariantViolation, match="I2: LRU counts 2 blocks, its log holds 1"):
        cache.pool.policy.check_invariants()
