"""Forked and truncated sequences: who copies a block before it writes, and which blocks are given back."""

import pytest
from memory_machine import digest

from pagedkv import (
    CacheConfig,
    InvalidArgumentError,
    KVCacheManager,
    SimulatedPrompt,
)
from pagedkv.testing.manager_allocator import pairs

# Forks and copies on write


def test_the_first_of_two_forks_to_write_copies_and_the_second_writes_in_place(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.fork("a", "b")
    manager.extend("a", [4])
    manager.extend("b", [5])
    first, second = manager.append("a", 1), manager.append("b", 1)
    assert (pairs(first.copies), first.slots.tolist()) == ([(1, 2)], [5])
    assert (pairs(second.copies), second.slots.tolist()) == ([], [3])


def test_of_three_forks_two_copy(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.fork("b", "c")
    num_copies = []
    for sequence_id in ("c", "a", "b"):
        manager.extend(sequence_id, [2])
        num_copies.append(len(manager.append(sequence_id, 1).copies))
    assert num_copies == [1, 1, 0]


def test_a_fork_at_a_block_boundary_copies_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.fork("a", "b")
    for sequence_id in ("a", "b"):
        manager.extend(sequence_id, [3])
        assert len(manager.append(sequence_id, 1).copies) == 0
    assert manager.statistics().num_used == 3


def test_a_fork_whose_other_half_is_closed_copies_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.close("a")
    manager.extend("b", [2])
    assert len(manager.append("b", 1).copies) == 0


def test_copying_and_growing_in_one_call_takes_the_copy_first(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.extend("b", [2, 3])
    appended = manager.append("b", 2)
    assert (pairs(appended.copies), appended.slots.tolist()) == ([(0, 1)], [3, 4])


def test_forks_extend_on_their_own(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.fork("a", "b")
    manager.extend("a", [2])
    manager.extend("b", [3])
    manager.append("a", 2)
    manager.append("b", 2)
    assert manager.open("like a", [1, 2, 9]) == 2
    assert manager.open("like b", [1, 3, 9]) == 2


def test_a_simulated_fork_shares_only_what_was_known(manager: KVCacheManager) -> None:
    manager.open("a", SimulatedPrompt(3, [7, 8], 2))
    manager.append("a", 3)
    manager.fork("a", "b")
    manager.extend("a", 1)
    manager.extend("b", 1)
    manager.append("a", 1)
    manager.append("b", 1)
    keys = [manager.memory.cache.key_of(int(manager.block_table(i)[1])) for i in ("a", "b")]
    assert None not in keys
    assert keys[0] != keys[1]


# Truncating


def test_truncating_gives_the_blocks_back_that_only_the_dropped_tokens_needed(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 5)
    manager.truncate("a", 2)
    assert (manager.block_table("a").tolist(), manager.num_computed("a")) == ([0], 2)
    assert manager.memory.pool.order() == [2, 3, 4, 5, 1]


def test_truncating_tokens_without_slots_keeps_every_block(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 2)
    manager.truncate("a", 3)
    assert (manager.block_table("a").tolist(), manager.num_computed("a")) == ([0], 2)
    with pytest.raises(InvalidArgumentError):
        manager.append("a", 2)


def test_truncating_to_all_known_tokens_changes_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    before = digest(manager)
    manager.truncate("a", 3)
    assert digest(manager) == before


def test_writing_into_a_named_block_after_truncating_copies_it(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.truncate("a", 1)
    manager.extend("a", [9])
    appended = manager.append("a", 1)
    assert (pairs(appended.copies), appended.slots.tolist()) == ([(0, 1)], [3])
    assert manager.open("b", [1, 2, 3]) == 2
    assert manager.open("c", [1, 9, 3]) == 2


def test_writing_into_an_unnamed_block_after_truncating_does_not_copy() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2, prefix_caching=False))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.truncate("a", 1)
    manager.extend("a", [9])
    assert len(manager.append("a", 1).copies) == 0


def test_dropped_and_replaced_tokens_are_hit_under_their_new_name_only(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.truncate("a", 2)
    manager.extend("a", [9, 9])
    manager.append("a", 2)
    assert manager.open("old", [1, 2, 3, 9, 5]) == 2
    assert manager.open("new", [1, 2, 9, 9, 5]) == 4
