from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import (
    BlockPool,
    BlockStateError,
    ConfigError,
    InvalidArgumentError,
    InvariantViolation,
    OutOfBlocksError,
)
from pagedkv.eviction import LRU


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int32)


def state(pool: BlockPool) -> tuple[object, ...]:
    every = np.arange(pool.num_blocks, dtype=np.int32)
    return (pool.counts(every).tolist(), pool.is_named(every).tolist(), pool.order(), pool.num_free, pool.num_evictable)


@pytest.fixture
def pool() -> BlockPool:
    """Block 0 held twice, 1 held once and named, 2 evictable, 3 free."""
    pool = BlockPool(4)
    pool.allocate(3)
    pool.acquire(ids(0))
    pool.name(ids(1, 2))
    pool.release(ids(2))
    return pool


def test_a_new_pool_hands_out_ascending_ids() -> None:
    assert BlockPool(4).allocate(4).tolist() == [0, 1, 2, 3]


def test_every_block_can_be_had_and_not_one_more() -> None:
    pool = BlockPool(3)
    assert pool.try_allocate(4) is None
    assert pool.allocate(3).tolist() == [0, 1, 2]
    assert pool.try_allocate(1) is None
    assert pool.try_allocate(0).tolist() == []


def test_free_and_evictable_blocks_together_can_be_had_exactly(pool: BlockPool) -> None:
    assert pool.num_available == 2
    assert pool.try_allocate(3) is None
    assert pool.allocate(2).tolist() == [3, 2]
    assert pool.num_available == 0


def test_a_shortage_names_both_numbers_and_changes_nothing(pool: BlockPool) -> None:
    before = state(pool)
    with pytest.raises(OutOfBlocksError) as caught:
        pool.allocate(3)
    assert (caught.value.num_requested, caught.value.num_free) == (3, 2)
    assert state(pool) == before


def test_used_evictable_and_free_blocks_add_up(pool: BlockPool) -> None:
    assert (pool.num_used, pool.num_evictable, pool.num_free) == (2, 1, 1)


def test_free_blocks_go_before_evictable_ones_however_long_they_are_free() -> None:
    pool = BlockPool(3)
    taken = pool.allocate(2)
    pool.name(taken[:1])
    pool.release(taken[::-1])
    assert pool.order() == [1, 2, 0]


def test_the_block_freed_last_goes_out_first() -> None:
    pool = BlockPool(4)
    pool.allocate(4)
    pool.release(ids(2))
    pool.release(ids(0))
    assert pool.allocate(2).tolist() == [0, 2]


def test_a_run_that_is_let_go_deepest_first_goes_out_in_ascending_order() -> None:
    pool = BlockPool(4)
    pool.release(pool.allocate(4)[::-1])
    assert pool.allocate(4).tolist() == [0, 1, 2, 3]


def test_evictable_blocks_go_in_the_order_in_which_they_were_let_go() -> None:
    pool = BlockPool(3)
    pool.name(pool.allocate(3))
    pool.release(ids(2, 1))
    pool.release(ids(0))
    assert pool.allocate(3).tolist() == [2, 1, 0]


def test_eviction_is_reported_before_the_block_goes_out() -> None:
    pool = BlockPool(2)
    evicted: list[list[int]] = []
    pool.on_evict = lambda block_ids: evicted.append(block_ids.tolist())
    pool.name(pool.allocate(2))
    pool.release(ids(1, 0))
    assert pool.allocate(1).tolist() == [1]
    assert evicted == [[1]]


def test_an_evicted_block_has_lost_its_name() -> None:
    pool = BlockPool(1)
    pool.name(pool.allocate(1))
    pool.release(ids(0))
    pool.allocate(1)
    assert pool.is_named(ids(0)).tolist() == [False]


def test_a_shared_block_stays_until_its_last_holder_leaves() -> None:
    pool = BlockPool(1)
    pool.acquire(pool.allocate(1))
    pool.release(ids(0))
    assert (pool.counts(ids(0)).tolist(), pool.num_free) == ([1], 0)
    pool.release(ids(0))
    assert (pool.counts(ids(0)).tolist(), pool.num_free) == ([0], 1)


def test_a_hit_takes_an_evictable_block_out_of_the_queue(pool: BlockPool) -> None:
    pool.acquire(ids(2))
    assert pool.order() == [3]
    assert pool.counts(ids(2)).tolist() == [1]


def test_a_hit_on_held_and_evictable_blocks_takes_only_the_latter_out_of_the_queue() -> None:
    pool = BlockPool(4)
    pool.name(pool.allocate(3))
    pool.release(ids(1, 0))
    pool.acquire(ids(0, 2))
    assert (pool.num_evictable, list(pool.policy.order())) == (1, [1])
    assert pool.counts(ids(0, 1, 2, 3)).tolist() == [1, 0, 2, 0]
    pool.check_invariants()


def test_a_block_is_writable_if_it_has_one_holder_and_no_name(pool: BlockPool) -> None:
    pool.allocate(1)
    assert [pool.is_writable(block_id) for block_id in range(4)] == [False, False, False, True]


def test_unnaming_frees_what_nobody_holds(pool: BlockPool) -> None:
    pool.unname(ids(1, 2))
    assert pool.order() == [2, 3]
    assert pool.is_named(ids(1, 2)).tolist() == [False, False]
    assert pool.counts(ids(1)).tolist() == [1]


def test_no_blocks_can_be_had_at_any_time() -> None:
    full = BlockPool(1)
    full.allocate(1)
    assert full.allocate(0).tolist() == []
    assert full.allocate(np.int64(0)).tolist() == []


def test_a_pool_may_be_empty() -> None:
    pool = BlockPool(0)
    assert pool.try_allocate(1) is None
    assert pool.allocate(0).tolist() == []
    pool.check_invariants()


MISTAKES = {
    "released twice": lambda pool: pool.release(ids(3)),
    "released while evictable": lambda pool: pool.release(ids(2)),
    "released with one that is free": lambda pool: pool.release(ids(0, 1, 3)),
    "released twice in one call": lambda pool: pool.release(ids(0, 0)),
    "acquired while free": lambda pool: pool.acquire(ids(3)),
    "acquired with one that is free": lambda pool: pool.acquire(ids(0, 2, 3)),
    "acquired twice in one call": lambda pool: pool.acquire(ids(2, 2)),
    "released, id beyond the pool": lambda pool: pool.release(ids(0, 4)),
    "acquired, id beyond the pool": lambda pool: pool.acquire(ids(4)),
    "released, negative id": lambda pool: pool.release(ids(0, -1)),
    "acquired, negative id": lambda pool: pool.acquire(ids(-4)),
    "released, huge id": lambda pool: pool.release(np.array([2**62])),
    "released, floats": lambda pool: pool.release(np.array([0.0])),
    "released, booleans": lambda pool: pool.release(np.array([True])),
    "released, a list": lambda pool: pool.release([0]),
    "released, an empty list": lambda pool: pool.release([]),
    "acquired, None": lambda pool: pool.acquire(None),
    "released, two rows": lambda pool: pool.release(np.array([[0, 1]])),
    "acquired, one number": lambda pool: pool.acquire(np.array(0)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_block_is_refused_and_nothing_changes(pool: BlockPool, mistake: Callable[[BlockPool], None]) -> None:
    before = state(pool)
    with pytest.raises(BlockStateError):
        mistake(pool)
    assert state(pool) == before
    pool.check_invariants()


@pytest.mark.parametrize("num_blocks", [-1, -(2**70), True, 1.0, float("nan"), float("inf"), "1", None, np.int64(-1)])
def test_a_wrong_number_of_blocks_is_refused_and_nothing_changes(pool: BlockPool, num_blocks: object) -> None:
    before = state(pool)
    with pytest.raises(InvalidArgumentError, match="num_blocks"):
        pool.try_allocate(num_blocks)
    assert state(pool) == before


def test_a_huge_number_of_blocks_is_a_shortage(pool: BlockPool) -> None:
    assert pool.try_allocate(2**70) is None


@pytest.mark.parametrize("num_blocks", [-1, 2**28 + 1, True, 2.0, float("nan"), None])
def test_a_pool_of_impossible_size_is_refused(num_blocks: object) -> None:
    with pytest.raises(InvalidArgumentError, match="num_blocks"):
        BlockPool(num_blocks)


@pytest.mark.parametrize("twice", [0, 1, 100, 199])
def test_a_long_call_that_names_a_block_twice_is_refused(twice: int) -> None:
    pool = BlockPool(300)
    taken = pool.allocate(200)
    with pytest.raises(BlockStateError, match="twice in one call"):
        pool.release(np.concatenate((taken, ids(twice))))
    assert pool.num_used == 200


@pytest.mark.parametrize("wrong", [-1, 300])
def test_a_long_call_with_an_id_beyond_the_pool_is_refused(wrong: int) -> None:
    pool = BlockPool(300)
    taken = pool.allocate(200)
    with pytest.raises(BlockStateError, match=r"must be in 0\.\.299"):
        pool.release(np.concatenate((taken, ids(wrong))))
    assert pool.num_used == 200


def test_a_long_call_reaches_every_block_from_the_first_to_the_last() -> None:
    pool = BlockPool(200)
    pool.release(pool.allocate(200)[::-1])
    assert pool.order() == list(range(200))


def test_only_blocks_without_a_holder_count_as_evictable(pool: BlockPool) -> None:
    pool.allocate(1)  # Block 3: held once, and without a name.
    assert pool.num_evictable_among(ids(0, 1, 2, 3)) == 1
    assert pool.num_evictable_among(ids(3)) == 0
    assert pool.num_evictable_among(ids()) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_draining_and_refilling_in_any_sizes_loses_no_block(moves: list[tuple[bool, int]]) -> None:
    pool = BlockPool(12)
    held: list[int] = []
    for takes, num in moves:
        if takes:
            taken = pool.try_allocate(num)
            assert (taken is None) == (num > 12 - len(held))
            held += [] if taken is None else taken.tolist()
        else:
            pool.release(ids(*held[:num]))
            del held[:num]
        assert sorted(held + pool.order()) == list(range(12))
        pool.check_invariants()


CORRUPTIONS = {
    "a free block is listed twice": lambda pool: pool._free.__setitem__(0, pool._free[1]),
    "a block is lost": lambda pool: setattr(pool, "_num_free", pool._num_free - 1),
    "a held block is listed as free": lambda pool: pool._free.__setitem__(0, 0),
    "a free block has a name": lambda pool: pool._state.__setitem__(3, 1),
    "an evictable block has no name": lambda pool: pool._state.__setitem__(2, 0),
    "a count is negative": lambda pool: pool._state.__setitem__(3, -2),
    "the policy lost a block": lambda pool: pool.policy.evict(1),
    "the policy looks for a block at another place": lambda pool: pool.policy._place.__setitem__(2, 1),
    "the policy counts one block too many": lambda pool: setattr(pool.policy, "_num_holes", -1),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_the_recount_finds_a_corrupted_pool(corrupt: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(5)
    pool.name(pool.allocate(3)[2:])
    pool.release(ids(2))
    pool.check_invariants()
    corrupt(pool)
    with pytest.raises(InvariantViolation, match=r"^I2: "):
        pool.check_invariants()


def test_the_sums_of_a_healthy_pool_hold_whether_blocks_are_free_used_or_evictable() -> None:
    pool = BlockPool(2)
    pool.check_some()
    taken = pool.allocate(2)
    pool.check_some()
    pool.release(taken[:1])
    pool.check_some()
    pool.allocate(1)
    pool.name(taken)
    pool.release(taken)
    assert (pool.num_free, pool.num_evictable) == (0, 2)
    pool.check_some()


WRONG_SUMS = {
    "fewer than no free blocks": lambda pool: setattr(pool, "_num_free", -1),
    "more unheld blocks than blocks": lambda pool: setattr(pool, "_num_free", 5),
    "the next free block is held": lambda pool: pool._free.__setitem__(1, 0),
    "the next free block has a name": lambda pool: pool._state.__setitem__(3, 1),
}


@pytest.mark.parametrize("corrupt", WRONG_SUMS.values(), ids=WRONG_SUMS)
def test_a_look_at_the_sums_finds(corrupt: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(5)  # Blocks 0 and 1 are used, 2 is evictable, 3 goes out next, then 4.
    pool.name(pool.allocate(3)[2:])
    pool.release(ids(2))
    pool.check_some()
    corrupt(pool)
    with pytest.raises(InvariantViolation, match=r"^I2: "):
        pool.check_some()


def test_a_policy_made_for_a_pool_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="made for 5 blocks, the pool has 4"):
        BlockPool(4, LRU(5))
