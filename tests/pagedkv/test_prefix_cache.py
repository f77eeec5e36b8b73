import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import BlockPool, InvariantViolation, PrefixCache
from pagedkv.eviction import FIFO, LRU, S3FIFO, SIEVE, EvictionPolicy


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int64)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8)


@pytest.fixture
def cache(pool: BlockPool) -> PrefixCache:
    """Blocks 0, 1, 2, held, are named a, b, c."""
    cache = PrefixCache(pool)
    cache.name_chain([b"a", b"b", b"c"], pool.allocate(3), -1)
    return cache


def num_resident_by_scan(keys: list[int], resident: set[int]) -> int:
    num = 0
    while num < len(keys) and keys[num] in resident:
        num += 1
    return num


@given(num_keys=st.integers(0, 40), num_named=st.integers(0, 40), num_foreign=st.integers(0, 5))
def test_the_longest_prefix_by_bisection_is_the_one_by_scanning(
    num_keys: int, num_named: int, num_foreign: int
) -> None:
    pool = BlockPool(50)
    cache = PrefixCache(pool)
    keys = list(range(100, 100 + num_keys))
    named = keys[:num_named]
    for run in (named, list(range(num_foreign))):
        if run:
            cache.name_chain(run, pool.allocate(len(run)), -1)
    for length in range(num_keys + 1):
        assert cache.num_resident(keys, length) == num_resident_by_scan(keys[:length], set(named))


def test_a_prefix_of_the_keys_is_looked_up_although_more_are_resident(cache: PrefixCache) -> None:
    keys = [b"a", b"b", b"c", b"d"]
    assert [cache.num_resident(keys, num) for num in range(5)] == [0, 1, 2, 3, 3]


def test_blocks_come_in_the_order_of_their_keys(cache: PrefixCache) -> None:
    assert cache.blocks([b"a", b"b", b"c"], 3).tolist() == [0, 1, 2]
    assert cache.blocks([b"a", b"b", b"c"], 1).tolist() == [0]
    assert [cache.key_of(block_id) for block_id in range(4)] == [b"a", b"b", b"c", None]


def test_the_first_block_with_a_key_keeps_the_name(pool: BlockPool, cache: PrefixCache) -> None:
    duplicate = pool.allocate(2)
    assert cache.name_chain([b"a", b"x"], duplicate, -1) == 0
    assert cache.blocks([b"a"], 1).tolist() == [0]
    assert pool.is_named(duplicate).tolist() == [False, False]
    assert len(cache) == 3


def test_naming_blocks_of_several_sequences_says_which_were_new(pool: BlockPool, cache: PrefixCache) -> None:
    is_new = cache.name_each([b"x", b"a", b"x"], pool.allocate(3), ids(-1, -1, -1))
    assert is_new.tolist() == [True, False, False]
    assert pool.is_named(ids(3, 4, 5)).tolist() == [True, False, False]
    assert cache.key_of(3) == b"x"
    cache.check_invariants()


LET_GO_FIRST, LEAF_NAMED_FIRST = [3, 2, 0, 1], [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("policy", "order"),
    [(LRU, LET_GO_FIRST), (FIFO, LEAF_NAMED_FIRST), (S3FIFO, LEAF_NAMED_FIRST), (SIEVE, LEAF_NAMED_FIRST)],
)
def test_blocks_of_several_sequences_that_were_named_at_once_can_be_evicted(
    policy: type[EvictionPolicy], order: list[int]
) -> None:
    pool = BlockPool(4, policy(4))
    cache = PrefixCache(pool)
    taken = pool.allocate(4)
    cache.name_each([b"a", b"b"], taken[:2], ids(-1, -1))
    cache.name_each([b"ab", b"b"], taken[2:], ids(0, -1))  # Block 2 continues block 0; block 3 is a duplicate of 1.
    pool.release(ids(2, 0, 1, 3))
    pool.check_invariants()
    assert pool.allocate(4).tolist() == order
    assert len(cache) == 0


def test_a_block_without_a_name_has_no_key(cache: PrefixCache) -> None:
    cache.unname(ids(2))
    assert cache.keys_of(ids(3, 1, 2, 0)) == [None, b"b", None, b"a"]


def test_an_evicted_block_is_forgotten(pool: BlockPool, cache: PrefixCache) -> None:
    pool.release(ids(2, 1, 0))
    pool.allocate(6)
    assert cache.num_resident([b"a", b"b", b"c"], 3) == 2
    assert cache.key_of(2) is None
    cache.check_invariants()


def test_heads_outlive_tails(pool: BlockPool, cache: PrefixCache) -> None:
    pool.release(ids(2, 1, 0))
    resident = []
    for num_blocks in (5, 1, 1, 1):
        pool.allocate(num_blocks)
        resident.append(cache.num_resident([b"a", b"b", b"c"], 3))
    assert resident == [3, 2, 1, 0]


def test_unnaming_a_held_block_leaves_it_with_its_holder(pool: BlockPool, cache: PrefixCache) -> None:
    cache.unname(ids(2))
    assert cache.num_resident([b"a", b"b", b"c"], 3) == 2
    assert pool.counts(ids(2)).tolist() == [1]
    cache.check_invariants()


def test_clearing_forgets_every_name_and_frees_what_nobody_holds(pool: BlockPool, cache: PrefixCache) -> None:
    pool.release(ids(2))
    cache.clear()
    assert len(cache) == 0
    assert (pool.num_used, pool.num_evictable, pool.num_free) == (2, 0, 6)
    cache.clear()
    pool.check_invariants()
    cache.check_invariants()


def test_the_recount_finds_a_key_without_a_block(cache: PrefixCache) -> None:
    cache._block_of[b"z"] = 5
    with pytest.raises(InvariantViolation, match=r"^I3: 4 keys for 3 named blocks"):
        cache.check_invariants()


def test_the_recount_finds_two_blocks_that_changed_names(cache: PrefixCache) -> None:
    cache._block_of[b"a"], cache._block_of[b"b"] = 1, 0
    with pytest.raises(InvariantViolation, match=r"^I3: block 0 has a key that names another block"):
        cache.check_invariants()


def test_ids_that_contradict_each_other_leave_one_block_to_a_name() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    cache.name_chain([1, 2], pool.allocate(2), -1)

    assert cache.name_chain([3, 2], pool.allocate(2), -1) == 1

    cache.check_invariants()
    assert cache.blocks([1, 2], 2).tolist() == [0, 1]
    assert cache.key_of(3) is None
