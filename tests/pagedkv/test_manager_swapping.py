"""Sequences go to the host and come back; the prefix cache is forgotten."""

import pytest
from memory_machine import digest

from pagedkv import (
    CacheConfig,
    KVCacheManager,
    OutOfBlocksError,
)
from pagedkv.testing.manager_allocator import pairs

# Swapping


def test_a_sequence_comes_back_from_the_host_into_new_blocks() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=3, block_size=2, num_host_blocks=3, prefix_caching=False))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    out = manager.swap_out("a")
    assert out.sources.tolist() == [0, 1]
    assert sorted(out.targets.tolist()) == [0, 1]
    assert manager.block_table("a").tolist() == []
    manager.open("b", [9])
    manager.append("b", 1)
    back = manager.swap_in("a")
    assert back.sources.tolist() == out.targets.tolist()
    assert back.targets.tolist() == manager.block_table("a").tolist() == [1, 2]
    assert manager.statistics().num_host_used == 0


def test_blocks_that_are_still_cached_are_not_copied_back(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 5)
    out = manager.swap_out("a")
    back = manager.swap_in("a")
    assert manager.block_table("a").tolist() == [0, 1, 2]
    assert pairs(back) == [(int(out.targets[2]), 2)]


def test_the_host_pool_can_be_filled_exactly() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=1, num_host_blocks=2))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    assert len(manager.swap_out("a")) == 2
    manager.open("b", [1])
    manager.append("b", 1)
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="1 host blocks requested, 0 can be had"):
        manager.swap_out("b")
    assert digest(manager) == before


def test_the_device_pool_can_be_filled_exactly_by_a_swap_in() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=1, num_host_blocks=2, prefix_caching=False))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.swap_out("a")
    manager.open("b", [9])
    manager.append("b", 1)
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="2 device blocks requested, 1 can be had"):
        manager.swap_in("a")
    assert digest(manager) == before
    manager.close("b")
    assert len(manager.swap_in("a")) == 2


def test_hits_that_nobody_holds_count_against_a_swap_in() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=1, num_host_blocks=2))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.swap_out("a")
    manager.open("b", [9])
    manager.append("b", 1)  # It takes block 1; block 0 is still cached.
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="2 device blocks requested, 1 can be had"):
        manager.swap_in("a")
    assert digest(manager) == before


def test_a_sequence_without_blocks_swaps_without_a_host_pool() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=1))
    manager.open("a", [1])
    assert len(manager.swap_out("a")) == 0
    assert len(manager.swap_in("a")) == 0
    assert manager.append("a", 1).slots.tolist() == [0]


def test_a_swapped_sequence_can_be_extended_and_closed(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    manager.extend("a", [4])
    manager.swap_in("a")
    manager.append("a", 1)
    assert manager.open("b", [1, 2, 3, 4, 5]) == 4
    manager.swap_out("a")
    manager.close("a")
    assert manager.statistics().num_host_used == 0
    manager.check_invariants()


# Resetting


def test_reset_is_refused_while_a_lookup_is_pinned(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.close("a")
    with manager.lookup([1, 2, 3]):
        assert manager.reset_prefix_cache() is False
    assert manager.reset_prefix_cache() is True
    assert manager.open("b", [1, 2, 3]) == 0


def test_a_swapped_sequence_survives_a_reset(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    assert manager.reset_prefix_cache() is True
    assert len(manager.swap_in("a")) == 2
    assert manager.open("b", [1, 2, 3]) == 2
    manager.check_invariants()
