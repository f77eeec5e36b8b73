"""The facts that a user of another engine's block manager expects, input by input, with the numbers they have there.

Ids are ours: that engine keeps block 0 for itself, so its "11 blocks, ids 1 to 10" are ten blocks, ids 0 to 9, here.
The order in which blocks would go out is `pool.order()`.

Not tested, for want of the feature: 14, 22 and 23 (windowed groups, null blocks), the windowed half of 21, 20's
lookahead slots beyond known tokens, 24 to 32 and 35 (scheduling: see the scheduler's tests), 33 (load failures), 34
(encoder cache). Two facts hold in another form: blocks of one sequence that nobody named go out in ascending order here,
not deepest first (15), and a hit rate without queries is None, not 0 (19).
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import (
    BlockPool,
    BlockStateError,
    CacheConfig,
    CacheIdentity,
    ExtraKey,
    HitRateWindow,
    KVCacheManager,
    OutOfBlocksError,
    PrefixCache,
)
from pagedkv.block_keys import chain_keys, root_key
from pagedkv.content import TokenContent
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

COMMON = list(range(48))
FIRST = [*COMMON, *[100] * 7]
SECOND = [*COMMON, *[200] * 5]


def ten_blocks() -> KVCacheManager:
    return KVCacheManager(CacheConfig(num_blocks=10, block_size=16))


def compute(manager: KVCacheManager, sequence_id: str, prompt: list[int], **namespace: object) -> int:
    """Open a sequence and compute all of its prompt; returns the tokens that were hit."""
    num_hit = manager.open(sequence_id, prompt, **namespace)
    manager.append(sequence_id, len(prompt) - num_hit)
    return num_hit


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int64)


def num_holders(manager: KVCacheManager, *block_ids: int) -> list[int]:
    return manager.memory.pool.counts(ids(*block_ids)).tolist()


def named(manager: KVCacheManager) -> list[int]:
    pool = manager.memory.pool
    return np.flatnonzero(pool.is_named(np.arange(pool.num_blocks))).tolist()


# Prefix cache


def test_01_a_first_prompt_of_48_and_7_tokens_takes_four_blocks_and_names_three() -> None:
    manager = ten_blocks()
    assert compute(manager, "a", FIRST) == 0
    assert manager.block_table("a").tolist() == [0, 1, 2, 3]
    assert num_holders(manager, 0, 1, 2, 3) == [1, 1, 1, 1]
    assert named(manager) == [0, 1, 2]


def test_01_the_names_are_chained_digests() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    parent = root_key(CacheIdentity(), 16)
    for block_id, start in ((0, 0), (1, 16), (2, 32)):
        tokens = b"".join(token.to_bytes(4, "little") for token in FIRST[start : start + 16])
        parent = sha256(parent + tokens).digest()
        assert manager.memory.cache.key_of(block_id) == parent
    assert manager.memory.cache.key_of(3) is None


def test_02_a_second_prompt_with_the_same_48_tokens_shares_three_blocks() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    assert compute(manager, "b", SECOND) == 48
    assert manager.block_table("b").tolist() == [0, 1, 2, 4]
    assert num_holders(manager, 0, 1, 2, 3, 4) == [2, 2, 2, 1, 1]
    assert manager.statistics().num_free == 5


def test_02_scratch_goes_out_first_and_cached_heads_last() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    compute(manager, "b", SECOND)
    manager.close("a")
    manager.close("b")
    assert manager.memory.pool.order() == [4, 3, 5, 6, 7, 8, 9, 2, 1, 0]


def test_03_a_third_prompt_hits_what_nobody_holds_and_reuses_the_scratch_block() -> None:
    manager = ten_blocks()
    for sequence_id, prompt in (("a", FIRST), ("b", SECOND)):
        compute(manager, sequence_id, prompt)
    manager.close("a")
    manager.close("b")
    assert compute(manager, "c", [*COMMON, *[300] * 7]) == 48
    assert manager.block_table("c").tolist() == [0, 1, 2, 4]
    assert manager.statistics().num_free == 6


def test_03_a_miss_of_160_tokens_then_takes_every_block_in_order() -> None:
    manager = ten_blocks()
    for sequence_id, prompt in (("a", FIRST), ("b", SECOND)):
        compute(manager, sequence_id, prompt)
    manager.close("a")
    manager.close("b")
    compute(manager, "c", [*COMMON, *[300] * 7])
    manager.close("c")
    assert compute(manager, "d", [999] * 160) == 0
    assert manager.block_table("d").tolist() == [4, 3, 5, 6, 7, 8, 9, 2, 1, 0]
    assert manager.memory.pool.order() == []


def test_04_four_decoded_tokens_fit_into_the_last_block_without_naming_it() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    manager.extend("a", [1, 2, 3, 4])
    manager.append("a", 4)
    assert manager.block_table("a").tolist() == [0, 1, 2, 3]
    assert named(manager) == [0, 1, 2]


def test_04_nineteen_more_take_one_block_and_name_the_one_that_they_fill() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    manager.extend("a", [1] * 23)
    manager.append("a", 4)
    manager.append("a", 19)
    assert manager.block_table("a").tolist() == [0, 1, 2, 3, 4]
    assert named(manager) == [0, 1, 2, 3]


def test_05_a_cached_block_that_goes_out_again_has_lost_its_name() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=16))
    compute(manager, "a", [1] * 16)
    manager.close("a")
    assert named(manager) == [0]
    compute(manager, "b", [2] * 3)
    assert named(manager) == []
    assert len(manager.memory.cache) == 0


def test_06_a_hit_block_is_not_the_one_that_is_evicted() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2))
    for sequence_id, prompt in (("a", [1, 1]), ("b", [2, 2])):
        compute(manager, sequence_id, prompt)
        manager.close(sequence_id)
    assert manager.memory.pool.order() == [0, 1]
    assert compute(manager, "c", [1, 1, 3]) == 2
    assert manager.block_table("c").tolist() == [0, 1]
    assert manager.memory.cache.key_of(0) is not None
    assert manager.memory.cache.key_of(1) is None


def test_07_without_prefix_caching_nothing_is_hit_and_capacity_is_the_same() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4, prefix_caching=False))
    compute(manager, "a", list(range(10)))
    assert len(manager.block_table("a")) == 3
    manager.close("a")
    assert compute(manager, "b", list(range(16))) == 0
    assert len(manager.block_table("b")) == 4
    manager.open("c", [1, 2, 3, 4])
    assert manager.try_append("c", 4) is None


def test_08_the_cache_is_not_reset_while_a_sequence_holds_blocks() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    assert manager.reset_prefix_cache() is False
    assert named(manager) == [0, 1, 2]


def test_08_after_a_reset_no_block_has_a_name_and_lookups_miss() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    manager.close("a")
    assert manager.reset_prefix_cache() is True
    assert named(manager) == []
    assert len(manager.memory.cache) == 0
    assert manager.open("b", FIRST) == 0


def test_09_full_blocks_are_cached_in_two_calls_and_the_early_ones_stay() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
    manager.open("a", [1, 2, 3, 4, 5, 6])
    manager.append("a", 4)
    cache = manager.memory.cache
    early = [cache.key_of(0), cache.key_of(1)]
    assert (len(cache), named(manager)) == (2, [0, 1])
    manager.append("a", 2)
    assert (len(cache), named(manager)) == (3, [0, 1, 2])
    assert [cache.key_of(0), cache.key_of(1)] == early


def test_10_the_same_salt_hits_and_another_misses() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST, salt=b"A")
    assert manager.open("same", FIRST, salt=b"A") == 48
    assert manager.open("other", FIRST, salt=b"B") == 0
    assert manager.open("none", FIRST) == 0


def test_10_the_salt_enters_the_first_block_only_and_the_others_by_chaining() -> None:
    roots = [root_key(CacheIdentity(), 2, salt=salt) for salt in (b"A", b"B")]
    tokens = np.array([1, 2, 3, 4], np.int32).tobytes()
    keys = [chain_keys(root, tokens, 8) for root in roots]
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] != keys[1][1]
    assert chain_keys(keys[0][0], tokens[8:], 8) == [keys[0][1]]


def test_11_equal_placeholders_with_another_item_or_offset_are_not_shared() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=10, block_size=4))
    prompt = [0, 0, 0, 0, 9]
    compute(manager, "a", prompt, extras=[ExtraKey(0, 2, b"cat")])
    assert manager.open("same", prompt, extras=[ExtraKey(0, 2, b"cat")]) == 4
    assert manager.open("another item", prompt, extras=[ExtraKey(0, 2, b"dog")]) == 0
    assert manager.open("another offset", prompt, extras=[ExtraKey(1, 3, b"cat")]) == 0


def test_11_another_adapter_has_another_hash() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST, adapter="x")
    assert manager.open("same", FIRST, adapter="x") == 48
    assert manager.open("other", FIRST, adapter="/path/to/x") == 0


def test_11_adapter_x_and_salt_x_have_different_hashes() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST, adapter="x")
    assert manager.open("b", FIRST, salt=b"x") == 0
    assert root_key(CacheIdentity(), 16, adapter="x") != root_key(CacheIdentity(), 16, salt=b"x")


def run(scheduler: Scheduler, request: Request) -> list[int]:
    """Run a request to its end; returns the position at which each of its steps began."""
    scheduler.add(request, now=0.0)
    starts = []
    while scheduler.has_work:
        plan = scheduler.schedule(now=0.0)
        starts += plan.starts.tolist()
        scheduler.update(plan, [7] * len(plan.sampling_rows), now=0.0)
    return starts


def test_12_a_request_that_does_not_read_the_cache_still_writes_it() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=64, max_num_running=2), ten_blocks())
    assert run(scheduler, Request("a", FIRST, 1, reads_cache=False)) == [0]
    assert run(scheduler, Request("b", FIRST, 1)) == [48]
    assert run(scheduler, Request("c", FIRST, 1, reads_cache=False)) == [0]


def test_13_a_request_that_is_tried_again_at_admission_is_counted_once() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=16, max_num_running=2), manager)
    scheduler.add(Request("a", list(range(12)), 3), now=0.0)
    scheduler.add(Request("b", list(range(50, 62)), 1), now=0.0)
    num_refused = 0
    while scheduler.has_work:
        plan = scheduler.schedule(now=0.0)
        num_refused += manager.statistics().prefix.num_queries == 1
        scheduler.update(plan, [7] * len(plan.sampling_rows), now=0.0)
    assert num_refused >= 2
    prefix = manager.statistics().prefix
    assert (prefix.num_queries, prefix.queried_tokens, prefix.num_resumed_queries) == (2, 24, 0)


def test_13_a_preempted_request_is_counted_again_and_apart() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=16, max_num_running=2, watermark=0.0), manager)
    scheduler.add(Request("a", [1, 2, 3], 4), now=0.0)
    scheduler.add(Request("b", [5, 6, 7], 4), now=0.0)
    while scheduler.has_work:
        plan = scheduler.schedule(now=0.0)
        scheduler.update(plan, [9] * len(plan.sampling_rows), now=0.0)
    prefix = manager.statistics().prefix
    assert (prefix.num_queries, prefix.queried_tokens) == (2, 6)
    assert prefix.num_resumed_queries == 1
    assert prefix.resumed_queried_tokens > 3


# Free queue and hashing


def test_15_blocks_leave_from_one_end_and_an_empty_queue_refuses() -> None:
    pool = BlockPool(5)
    assert pool.allocate(1).tolist() == [0]
    pool.release(ids(0))
    assert pool.allocate(5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)


def test_15_a_hit_leaves_from_the_middle_and_returns_at_the_tail() -> None:
    pool = BlockPool(5)
    PrefixCache(pool).name_chain([b"a", b"b", b"c", b"d", b"e"], pool.allocate(5), -1)
    pool.release(ids(4, 3, 2, 1, 0))
    pool.acquire(ids(2))
    assert pool.order() == [4, 3, 1, 0]
    pool.release(ids(2))
    assert pool.order() == [4, 3, 1, 0, 2]


def test_15_taking_and_returning_nothing_does_nothing() -> None:
    pool = BlockPool(2)
    pool.acquire(ids())
    pool.release(ids())
    assert pool.allocate(0).tolist() == []
    assert pool.order() == [0, 1]


def test_15_scratch_returned_later_goes_out_earlier() -> None:
    pool = BlockPool(6)
    pool.allocate(6)
    pool.release(ids(0))
    pool.release(ids(5, 4))
    pool.release(ids(2, 1))
    assert pool.allocate(5).tolist() == [1, 2, 4, 5, 0]


@given(st.integers(1, 40), st.integers(1, 7))
def test_15_draining_and_refilling_in_any_sizes_keeps_every_block(num_blocks: int, size: int) -> None:
    pool = BlockPool(num_blocks)
    for _ in range(3):
        taken = []
        while pool.num_available:
            taken.append(pool.allocate(min(size, pool.num_available)))
        pool.check_invariants()
        for block_ids in taken:
            pool.release(block_ids[::-1])
        pool.check_invariants()
        assert sorted(pool.order()) == list(range(num_blocks))


def test_16_taking_a_block_that_is_not_in_the_queue_raises() -> None:
    pool = BlockPool(2)
    with pytest.raises(BlockStateError, match="blocks \\[0\\] are free"):
        pool.acquire(ids(0))
    pool.allocate(1)
    pool.release(ids(0))
    with pytest.raises(BlockStateError, match="released twice"):
        pool.release(ids(0))


def test_17_records_have_slots_and_short_representations() -> None:
    manager = ten_blocks()
    compute(manager, "a", FIRST)
    with manager.lookup(FIRST) as hit:
        memory = manager.memory
        for record in (hit, hit.content, memory, memory.pool, memory.cache, memory.sequences, memory.counters):
            assert not hasattr(record, "__dict__")
            assert len(repr(record)) < 300


def test_18_a_name_hashes_the_parent_the_tokens_and_the_extras() -> None:
    root = bytes(32)
    content = TokenContent(np.array([1, 2, 3, 4, 5, 6], np.int32), 3, root)
    first = sha256(root + bytes((1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0))).digest()
    second = sha256(first + bytes((4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0))).digest()
    assert list(content.keys(2)) == [first, second]


def test_18_appended_tokens_add_names_that_equal_those_from_scratch() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=3))
    compute(manager, "a", [1])
    for token in range(2, 10):
        manager.extend("a", [token])
        manager.append("a", 1)
    scratch = KVCacheManager(CacheConfig(num_blocks=4, block_size=3))
    compute(scratch, "b", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert named(manager) == named(scratch) == [0, 1, 2]
    for block_id in range(3):
        assert manager.memory.cache.key_of(block_id) == scratch.memory.cache.key_of(block_id)


def test_19_the_hit_rate_window_drops_the_oldest_record_beyond_five_requests() -> None:
    window = HitRateWindow(max_requests=5)
    window.record(1, num_queried=20, num_hit=9)
    assert window.hit_rate == 0.45
    window.record(4, num_queried=80, num_hit=16)
    assert window.hit_rate == 0.25
    window.record(1, num_queried=10, num_hit=2)
    assert window.hit_rate == 0.2
    window.reset()
    assert window.hit_rate is None


@pytest.mark.parametrize("num_drafts", [2, 4])
def test_20_three_tokens_and_their_drafts_take_two_blocks_of_four(num_drafts: int) -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=4))
    manager.open("a", [1, 2, 3])
    manager.extend("a", [9] * num_drafts)
    manager.append("a", 3 + num_drafts)
    assert len(manager.block_table("a")) == 2


def test_21_hits_that_nobody_holds_count_like_new_blocks() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=20, block_size=1))
    compute(manager, "a", list(range(10)))
    manager.close("a")
    manager.open("b", list(range(20)))
    assert manager.memory.pool.num_available == 10
    assert manager.append("b", 10).slots.tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert manager.memory.pool.num_available == 0


def test_21_with_one_block_less_the_same_sequence_does_not_fit() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=20, block_size=1))
    compute(manager, "a", list(range(10)))
    manager.close("a")
    compute(manager, "other", [99])
    manager.open("b", list(range(20)))
    assert manager.try_append("b", 10) is None
    assert manager.try_append("b", 9) is not None
