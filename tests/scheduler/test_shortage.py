"""Whom a shortage of blocks meets: somebody whose seat gives a block back."""

from __future__ import annotations

import pytest
from small_scheduler import Events

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler import LowestPriority, Priority, Request, Scheduler, SchedulerConfig


def test_who_shares_all_blocks_keeps_its_seat_while_another_would_give_one_back() -> None:
    events = Events()
    scheduler = Scheduler(
        SchedulerConfig(10, 4, watermark=0),
        KVCacheManager(CacheConfig(num_blocks=5, block_size=4)),
        policy=Priority(),
        victim=LowestPriority(),
        sink=events,
    )
    # All of its four blocks are hit by the other in the step that computes the last of them; only then does it need a fifth.
    scheduler.add(Request("shares", SimulatedPrompt(16, [1, 2, 3, 4], 4), 4, priority=9), 0.0)
    scheduler.update(scheduler.schedule(0.0), None, 0.0)
    scheduler.add(Request("owns", SimulatedPrompt(18, [1, 2, 3, 4, 5], 4), 2, priority=0), 0.0)
    scheduler.update(scheduler.schedule(1.0), None, 1.0)
    scheduler.update(scheduler.schedule(2.0), None, 2.0)

    preempted = events.named("Preempted")
    assert [(event.request_id, event.num_used_before, event.num_used_after) for event in preempted] == [("owns", 5, 4)]


def test_siblings_that_share_everything_lose_their_seats_all_the_same() -> None:
    events = Events()
    scheduler = Scheduler(
        SchedulerConfig(32, 4, watermark=0), KVCacheManager(CacheConfig(num_blocks=3, block_size=4)), sink=events
    )
    scheduler.add(Request("twins", SimulatedPrompt(8), 4, n=2), 0.0)
    while scheduler.has_work:
        scheduler.update(scheduler.schedule(0.0), None, 0.0)

    used = [(event.num_used_before, event.num_used_after) for event in events.named("Preempted")]
    assert used
    assert used[0] == (2, 2)


def test_a_decode_is_planned_anew_once_however_many_lose_their_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    scheduler = Scheduler(
        SchedulerConfig(64, 9, watermark=0), KVCacheManager(CacheConfig(num_blocks=9, block_size=4)), sink=events
    )
    for name in "abcdefghi":
        scheduler.add(Request(name, SimulatedPrompt(4), 4), 0.0)
    scheduler.update(scheduler.schedule(0.0), None, 0.0)
    num_tries = 0
    try_append_single = RowMemory.try_append_single

    def counted(*args):
        nonlocal num_tries
        num_tries += 1
        return try_append_single(*args)

    monkeypatch.setattr(RowMemory, "try_append_single", counted)
    plan = scheduler.schedule(1.0)

    # Each needs a second block: five give one back until four of the nine can have theirs.
    told = [(event.request_id, event.num_needed_blocks) for event in events.named("Preempted")]
    assert told == [("i", 9), ("h", 8), ("g", 7), ("f", 6), ("e", 5)]
    assert (plan.num_rows, num_tries) == (4, 2)
    scheduler.check_invariants()
