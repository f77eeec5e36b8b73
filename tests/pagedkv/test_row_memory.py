import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_machine import digest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt


def rows_of(manager: KVCacheManager, *sequence_ids: str) -> np.ndarray:
    return np.array([manager.row(sequence_id) for sequence_id in sequence_ids])


def one_each(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows), np.int64)


def test_blocks_are_handed_out_in_the_order_of_the_rows(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.open("b", [4])
    manager.memory.try_append(rows_of(manager, "b", "a"), np.array([1, 3]))
    assert manager.block_table("b").tolist() == [0]
    assert manager.block_table("a").tolist() == [1, 2]


def test_a_batch_that_does_not_fit_as_a_whole_changes_nothing() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=1))
    manager.open("a", [1, 2])
    manager.open("b", [3])
    before = digest(manager)
    assert manager.memory.try_append(rows_of(manager, "a", "b"), np.array([2, 1])) is None
    assert digest(manager) == before
    assert manager.memory.try_append(rows_of(manager, "a", "b"), np.array([1, 1])) is not None


def test_in_a_batch_of_all_forks_the_last_one_writes_in_place(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.fork("a", "c")
    rows = rows_of(manager, "a", "b", "c")
    manager.memory.tokens.extend(rows, np.array([7, 8, 9], np.int32))
    copies = manager.memory.try_append(rows, one_each(rows))
    assert list(zip(copies.sources.tolist(), copies.targets.tolist(), strict=True)) == [(0, 1), (0, 2)]
    assert [manager.block_table(i).tolist() for i in "abc"] == [[1], [2], [0]]
    assert manager.memory.leaps.are_possible
    manager.check_invariants()


def test_single_tokens_of_forks_are_copied_on_write(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    rows = rows_of(manager, "a", "b")
    manager.memory.tokens.extend(rows, np.array([7, 8], np.int32))
    copies = manager.memory.try_append_single(rows, np.array([1, 1]))
    assert (copies.sources.tolist(), copies.targets.tolist()) == ([0], [1])


def test_a_run_of_a_fork_is_copied_on_write(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 1)
    manager.fork("a", "b")
    copies = manager.memory.try_append_run(manager.row("b"), 3)
    assert (copies.sources.tolist(), copies.targets.tolist()) == ([0], [1])
    assert manager.block_table("b").tolist() == [1, 2]


def test_many_tokens_at_once_make_known_what_one_by_one_does() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=3))
    memory = manager.memory
    manager.open("a", [1, 2])
    row = manager.row("a")
    memory.tokens.extend(np.array([row]), np.array([3], np.int32))
    memory.tokens.extend(np.array([row]), np.array([4], np.int32))
    memory.tokens.extend_run(row, np.array([5], np.int32))
    memory.tokens.extend_run(row, np.array([6, 7, 8, 9, 10], np.int32))
    memory.tokens.extend(np.array([row]), np.array([11], np.int32))
    known = memory.tokens.packed(np.array([row]), np.array([0]), np.array([11]))
    assert known.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_run_for_which_blocks_are_short_changes_nothing(manager: KVCacheManager) -> None:
    manager.open("a", list(range(13)))
    manager.memory.try_append_run(manager.row("a"), 3)
    before = digest(manager)
    assert manager.memory.try_append_run(manager.row("a"), 10) is None
    assert digest(manager) == before
    assert len(manager.memory.try_append_run(manager.row("a"), 9)) == 0
    assert manager.block_table("a").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_run_of_a_duplicate_names_nothing(manager: KVCacheManager) -> None:
    for sequence_id in ("a", "b"):
        manager.open(sequence_id, [1, 2, 3, 4])
    for sequence_id, num_tokens in (("a", 2), ("b", 2), ("b", 2)):
        manager.memory.try_append_run(manager.row(sequence_id), num_tokens)
    assert len(manager.memory.cache) == 1
    manager.check_invariants()


def test_of_two_rows_that_fill_the_same_block_at_once_the_first_names_it(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.open("b", [1, 2])
    manager.memory.try_append(rows_of(manager, "b", "a"), np.array([2, 2]))
    with manager.lookup([1, 2, 3]) as hit:
        assert hit.block_ids.tolist() == manager.block_table("b").tolist()
    manager.check_invariants()


def test_known_tokens_come_packed(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.open("b", [6])
    manager.extend("b", [7])
    rows = rows_of(manager, "b", "a", "a")
    packed = manager.memory.tokens.packed(rows, np.array([1, 1, 4]), np.array([1, 3, 1]))
    assert packed.tolist() == [7, 2, 3, 4, 5]


def test_a_simulated_sequence_has_no_token_ids(manager: KVCacheManager) -> None:
    manager.open("a", SimulatedPrompt(3))
    with pytest.raises(InvalidArgumentError, match="no token ids"):
        manager.memory.tokens.packed(rows_of(manager, "a"), np.array([0]), np.array([3]))


def test_the_names_of_a_failed_step_are_forgotten(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 2)
    manager.memory.begin_step()
    manager.memory.try_append_run(manager.row("a"), 2)
    assert manager.memory.unname_step().tolist() == [1]
    with manager.lookup([1, 2, 3, 4, 5]) as hit:
        assert hit.num_tokens == 2
    assert manager.memory.unname_step().tolist() == []


def test_steps_are_affordable_until_the_blocks_are_gone() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=5, block_size=2))
    for sequence_id in ("a", "b"):
        manager.open(sequence_id, SimulatedPrompt(1))
        manager.append(sequence_id, 1)
    rows = rows_of(manager, "a", "b")
    assert [manager.memory.leaps.num_affordable(rows, num) for num in (1, 3, 4, 100)] == [1, 3, 3, 3]


@given(
    block_size=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    num_steps=st.integers(1, 9),
    num_blocks=st.integers(4, 40),
    caching=st.booleans(),
)
@settings(max_examples=200)
def test_many_steps_at_once_are_the_same_steps_one_by_one(
    block_size: int, lengths: list[int], num_steps: int, num_blocks: int, caching: bool
) -> None:
    twins = []
    for _ in range(2):
        manager = KVCacheManager(CacheConfig(num_blocks, block_size, prefix_caching=caching))
        for i, length in enumerate(lengths):
            manager.open(i, SimulatedPrompt(length, list(range(50, 50 + length // block_size)), block_size))
            if (
                manager.try_append(i, manager.memory.sequences.num_known[manager.row(i)] - manager.num_computed(i))
                is None
            ):
                return
        twins.append(manager)
    at_once, one_by_one = (twin.memory for twin in twins)
    rows = np.arange(len(lengths))
    num_steps = min(num_steps, at_once.leaps.num_affordable(rows, num_steps))
    if num_steps == 0:
        return

    num_taken = at_once.leaps.append(rows, num_steps).tolist()

    expected = []
    one_by_one.tokens.extend(rows, None)
    for _ in range(num_steps):
        before = one_by_one.pool.num_available
        assert len(one_by_one.try_append(rows, one_each(rows))) == 0
        one_by_one.tokens.extend(rows, None)
        expected.append(before - one_by_one.pool.num_available)
    assert num_taken == expected
    assert digest(twins[0]) == digest(twins[1])
    twins[0].check_invariants()
