import pytest

from pagedkv import CacheConfig, HitRateWindow, InvalidArgumentError, KVCacheManager


def test_an_empty_memory_uses_nothing() -> None:
    statistics = KVCacheManager(CacheConfig(num_blocks=4, block_size=2, num_host_blocks=3)).statistics()
    assert (statistics.num_used, statistics.num_evictable, statistics.num_free) == (0, 0, 4)
    assert (statistics.num_host_blocks, statistics.num_host_used, statistics.num_sequences) == (3, 0, 0)
    assert (statistics.utilization, statistics.internal_fragmentation, statistics.hit_rate) == (0.0, 0.0, None)


def test_used_cached_and_free_blocks_are_told_apart() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=2))
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 4)
    manager.open("b", [5])
    manager.append("b", 1)
    manager.close("a")
    statistics = manager.statistics()
    assert (statistics.num_used, statistics.num_evictable, statistics.num_free) == (1, 2, 5)
    assert (statistics.num_slots, statistics.num_tokens) == (2, 1)
    assert (statistics.utilization, statistics.internal_fragmentation) == (0.125, 0.5)


def test_a_shared_block_is_used_once_and_its_slots_count_for_each_sequence() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.fork("a", "b")
    statistics = manager.statistics()
    assert (statistics.num_used, statistics.num_slots, statistics.num_tokens) == (1, 8, 6)


def test_a_swapped_sequence_holds_host_blocks_only() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4, num_host_blocks=2))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    statistics = manager.statistics()
    assert (statistics.num_used, statistics.num_host_used, statistics.num_sequences) == (0, 1, 1)
    assert (statistics.num_slots, statistics.num_tokens) == (0, 0)


def test_a_closed_sequence_leaves_no_token_behind() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.close("a")
    assert (manager.statistics().num_slots, manager.statistics().num_tokens) == (0, 0)


def test_hits_are_counted_when_a_sequence_opens_and_not_at_the_lookup() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 4)
    manager.lookup([1, 2, 3, 4, 5]).drop()
    assert manager.statistics().prefix.num_queries == 1
    manager.open("b", [1, 2, 3, 4, 5])
    prefix = manager.statistics().prefix
    assert (prefix.num_queries, prefix.queried_tokens, prefix.hit_tokens) == (2, 9, 4)
    assert (prefix.queried_blocks, prefix.hit_blocks) == (4, 2)
    assert manager.statistics().hit_rate == 4 / 9


def test_statistics_are_a_look_at_one_moment() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
    before = manager.statistics()
    manager.open("a", [1, 2, 3])
    assert before.prefix.num_queries == 0


def test_a_window_keeps_whole_records_and_at_least_one() -> None:
    window = HitRateWindow(max_requests=2)
    window.record(5, num_queried=10, num_hit=5)
    assert window.hit_rate == 0.5
    window.record(1, num_queried=10, num_hit=1)
    assert window.hit_rate == 0.1


def test_a_window_that_was_asked_nothing_is_not_one_without_hits() -> None:
    window = HitRateWindow(max_requests=2)
    assert window.hit_rate is None
    window.record(1, num_queried=4, num_hit=0)
    assert window.hit_rate == 0.0


@pytest.mark.parametrize("max_requests", [0, -1, 1.5, float("nan"), True, None])
def test_a_window_holds_at_least_one_request(max_requests: object) -> None:
    with pytest.raises(InvalidArgumentError, match="max_requests"):
        HitRateWindow(max_requests)


def test_a_lookup_that_was_forgotten_is_seen_in_the_statistics() -> None:
    manager = KVCacheManager(CacheConfig(8, 2))
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 5)
    hit = manager.lookup([1, 2, 3, 4, 5])
    assert manager.statistics().num_pinned == 2
    hit.drop()
    assert manager.statistics().num_pinned == 0
