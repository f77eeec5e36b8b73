"""Policies by name, and what all of them refuse or find."""

import numpy as np
import pytest

from pagedkv.errors import ConfigError, InvalidArgumentError, InvariantViolation
from pagedkv.eviction import FIFO, LRU, POLICY_NAMES, S3FIFO, SIEVE, make_policy


def test_the_names_are_these_and_lru_is_the_first():
    assert POLICY_NAMES == ("lru", "fifo", "s3-fifo", "sieve")


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_policy_is_made_by_the_name_that_it_reports(name):
    assert make_policy(name, 4).name == name


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="must be one of lru, fifo, s3-fifo, sieve, found 'mru'"):
        make_policy("mru", 4)


@pytest.mark.parametrize("policy", [FIFO, S3FIFO, SIEVE])
@pytest.mark.parametrize("num_blocks", [-1, 2**28 + 1, 1.5, True])
def test_a_number_of_blocks_out_of_range_is_refused(policy, num_blocks):
    with pytest.raises(InvalidArgumentError, match="num_blocks must be"):
        policy(num_blocks)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_policy_for_no_blocks_is_empty(name):
    policy = make_policy(name, 0)
    policy.check_invariants()
    assert (len(policy), list(policy.order()), policy.evict(0).tolist()) == (0, [], [])


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_no_victims_are_none_and_change_nothing(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("a", "b", "c", "b")
    held = cache.open("a")
    order = cache.order
    assert cache.pool.policy.evict(0).tolist() == []
    assert cache.order == order
    cache.close(held)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_looking_at_the_order_changes_nothing(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("ab", "ab", "c", "d", "ab", "e")
    order = cache.order
    assert cache.order == order
    victims = [cache.text(block) for block in cache.pool.policy.order()]
    blocks = cache.pool.policy.evict(4).tolist()
    assert victims == order
    assert sorted(blocks) == [0, 1, 2, 3]


# Corruption is found


@pytest.mark.parametrize("name", ["fifo", "s3-fifo", "sieve"])
def test_a_leaf_that_fell_out_of_its_queue_is_found(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("ab", "c")
    policy = cache.pool.policy
    for heap in (getattr(policy, slot, None) for slot in ("_leaves", "_small", "_main", "_ahead", "_behind")):
        if heap is not None:
            heap.discard(np.arange(4))
            heap._entries.clear()
    with pytest.raises(InvariantViolation, match="I2: an evictable leaf is missing"):
        policy.check_invariants()


@pytest.mark.parametrize("name", ["fifo", "s3-fifo", "sieve"])
def test_a_queue_that_lost_its_order_is_found(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("a", "b", "c")
    policy = cache.pool.policy
    for heap in (getattr(policy, slot, None) for slot in ("_leaves", "_small", "_ahead", "_behind")):
        if heap is not None:
            heap._entries.reverse()
    with pytest.raises(InvariantViolation, match="I2: the heap of evictable leaves has lost its order"):
        policy.check_invariants()


@pytest.mark.parametrize("name", ["fifo", "s3-fifo", "sieve"])
def test_a_copy_is_as_sound_as_its_original(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("ab", "ab", "c")
    copy = cache.pool.policy._copy()
    copy.check_invariants()
    assert (len(copy), list(copy.order())) == (3, list(cache.pool.policy.order()))


@pytest.mark.parametrize("name", ["fifo", "s3-fifo", "sieve"])
def test_two_blocks_with_one_number_are_found(chains, name):
    cache = chains(make_policy(name, 4), 4)
    cache.use("ab")
    cache.pool.policy._numbers[:] = 0
    with pytest.raises(InvariantViolation, match="I14: two blocks have the same number"):
        cache.pool.policy.check_invariants()


def test_a_wrong_count_of_the_small_queue_is_found(chains):
    cache = chains(S3FIFO(4), 4)
    cache.use("a")
    cache.pool.policy._num_small = 2
    with pytest.raises(InvariantViolation, match="counts 2 blocks in its small queue of 1"):
        cache.pool.policy.check_invariants()


def test_a_ghost_of_a_named_block_is_found(chains):
    cache = chains(S3FIFO(4), 4)
    cache.use("a")
    cache.pool.policy._ghost[b"a"] = None
    with pytest.raises(InvariantViolation, match="I3: the ghost queue"):
        cache.pool.policy.check_invariants()


def test_a_policy_whose_tables_promise_a_leaf_that_is_not_there_says_so(chains):
    for policy in (FIFO(2), S3FIFO(2), SIEVE(2)):
        with pytest.raises(InvariantViolation, match="finds no leaf among 0 evictable blocks"):
            policy.evict(1)


def test_a_wrong_place_in_the_lru_log_is_found(chains):
    cache = chains(LRU(4), 4)
    cache.use("a", "b")
    cache.pool.policy._place[:] = 0
    with pytest.raises(InvariantViolation, match="I2: a block stands in the LRU log at another place"):
        cache.pool.policy.check_invariants()
