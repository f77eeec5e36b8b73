"""Slots for drafts: how many there are, taken all or not at all, and given back but for those of accepted ones."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import CacheConfig, InvariantViolation, KVCacheManager


def computed(num_blocks: int = 8, **prompts: list[int]) -> KVCacheManager:
    """Sequences whose tokens all have slots, in blocks of two."""
    manager = KVCacheManager(CacheConfig(num_blocks, 2))
    for name, prompt in prompts.items():
        manager.open(name, prompt)
        manager.append(name, len(prompt))
    return manager


def test_drafts_take_the_rest_of_the_last_block_and_then_new_ones_in_order_of_rows() -> None:
    manager = computed(a=[1, 2, 3], b=[4, 5])
    memory = manager.memory

    assert memory.drafts.try_give(np.array([0, 1]), np.array([2, 3]))

    assert manager.block_table("a").tolist() == [0, 1, 3]
    assert manager.block_table("b").tolist() == [2, 4, 5]
    assert (manager.num_computed("a"), memory.sequences.num_drafts[:2].tolist()) == (3, [2, 3])
    manager.check_invariants()


def test_if_blocks_are_short_no_row_gets_any() -> None:
    manager = computed(4, a=[1, 2, 3], b=[4, 5])

    assert not manager.memory.drafts.try_give(np.array([0, 1]), np.array([1, 3]))

    assert manager.block_table("a").tolist() == [0, 1]
    assert manager.memory.sequences.num_drafts[:2].tolist() == [0, 0]
    manager.check_invariants()


def test_accepted_drafts_count_as_computed_and_the_blocks_of_the_others_are_free_again() -> None:
    manager = computed(a=[1, 2, 3], b=[4, 5])
    memory, rows = manager.memory, np.array([0, 1])
    memory.drafts.try_give(rows, np.array([4, 3]))
    for name in ("a", "b"):
        manager.extend(name, [7, 8])

    memory.drafts.settle(rows, np.array([1, 0]))

    assert manager.block_table("a").tolist() == [0, 1]
    assert manager.block_table("b").tolist() == [2]
    assert (manager.num_computed("a"), manager.num_computed("b")) == (4, 2)
    assert manager.statistics().num_free == 5
    assert len(memory.cache) == 3  # Both of a, one of b.
    assert memory.leaps.are_possible  # Nothing must be copied before the next write.
    manager.check_invariants()


def test_a_row_given_back_with_drafts_leaves_none_to_the_next_owner_of_the_row() -> None:
    manager = computed(a=[1, 2, 3])
    manager.memory.drafts.try_give(np.array([0]), np.array([4]))

    manager.close("a")
    manager.open("b", [9])

    assert manager.row("b") == 0
    assert manager.statistics().num_used == 0
    manager.check_invariants()


def test_a_block_kept_for_no_draft_is_a_violation() -> None:
    manager = computed(a=[1, 2, 3])
    manager.memory.drafts.try_give(np.array([0]), np.array([4]))
    manager.memory.sequences.num_drafts[0] = 1

    with pytest.raises(InvariantViolation, match="I1: row 0 holds 4 blocks for 3 tokens and 1 drafts"):
        manager.check_invariants()


def test_blocks_of_wrong_drafts_go_out_again_in_ascending_order() -> None:
    manager = computed(a=[1, 2, 3])
    memory, rows = manager.memory, np.array([0])

    for _ in range(2):
        memory.drafts.try_give(rows, np.array([5]))
        assert manager.block_table("a").tolist() == [0, 1, 2, 3]
        memory.drafts.settle(rows, np.array([0]))


def test_drafts_of_many_rows() -> None:
    manager = computed(400, **{f"s{i}": [i, i, i] for i in range(100)})
    rows = np.arange(100)

    assert manager.memory.drafts.try_give(rows, np.full(100, 2))

    assert manager.statistics().num_used == 300
    manager.check_invariants()


def test_what_fits_is_what_the_own_blocks_and_then_the_available_ones_have_room_for() -> None:
    manager = computed(6, a=[1, 2, 3], b=[4, 5], c=[6])
    drafts, rows = manager.memory.drafts, np.array([0, 1, 2])

    assert drafts.num_fitting(rows, np.array([9, 9, 9])).tolist() == [5, 0, 1]
    assert drafts.num_fitting(rows, np.array([1, 2, 4])).tolist() == [1, 2, 3]
    assert drafts.num_fitting(rows, np.array([0, 0, 0])).tolist() == [0, 0, 0]
    assert drafts.try_give(rows, np.array([1, 2, 3]))
    manager.check_invariants()
