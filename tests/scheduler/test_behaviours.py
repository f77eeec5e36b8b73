"""Facts that users of vLLM's core expect of a scheduler, by the numbers of the list that they come from.

Left out, because the parts do not exist here: 32 (asynchronous steps), 33 (connectors), 34 (encoders), 35 (prefill
cadence); of 25 the adaptive floor. 31 (speculation) is in test_drafts.py, but for counts per position.
"""

from __future__ import annotations

import pytest

from pagedkv import CacheConfig, KVCacheManager, UnknownIdError
from pagedkv.scheduler import Priority, Request, Scheduler, SchedulerConfig


def make_scheduler(config: SchedulerConfig, *, num_blocks: int = 1000, block_size: int = 16, **policies) -> Scheduler:
    return Scheduler(config, KVCacheManager(CacheConfig(num_blocks, block_size)), **policies)


def prompt(num_tokens: int, first: int = 0) -> list[int]:
    return [first * 10_000 + i for i in range(num_tokens)]


def add_prompts(scheduler: Scheduler, *lengths: int) -> None:
    for i, length in enumerate(lengths):
        scheduler.add(Request(f"r{i}", prompt(length, i), 4), 0.0)


def finish(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, [7] * len(plan.sampling_rows), 0.0)


def test_fact_24_chunked_prefill_fills_the_budget_with_part_of_the_next_prompt() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3, watermark=0))
    add_prompts(scheduler, 800, 800, 10, 10)

    assert scheduler.schedule(0.0).num_tokens.tolist() == [800, 224]


def test_fact_24_without_chunks_nothing_skips_ahead_of_a_prompt_that_exceeds_the_budget_left() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3, watermark=0, chunked_prefill=False))
    add_prompts(scheduler, 800, 800, 10, 10)

    assert scheduler.schedule(0.0).num_tokens.tolist() == [800]


def test_fact_25_a_lone_long_prompt_gets_the_whole_budget() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3, long_prefill_tokens=400))
    add_prompts(scheduler, 2000)

    assert scheduler.schedule(0.0).num_tokens.tolist() == [1024]


def test_fact_25_beside_another_a_long_prompt_is_capped() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3, long_prefill_tokens=400))
    add_prompts(scheduler, 2000, 10)

    assert scheduler.schedule(0.0).num_tokens.tolist() == [400, 10]


@pytest.mark.parametrize(
    ("tokens", "answer", "reason"), [([5, 9, 5, 5], [5, 9], "stop"), ([5, 6, 7, 8], [5, 6, 7, 8], "length")]
)
def test_fact_26_a_request_ends_with_a_stop_token_or_at_its_length(tokens, answer, reason) -> None:
    scheduler = make_scheduler(SchedulerConfig(64, 2))
    scheduler.add(Request("a", prompt(5), 4, stop_token_ids=(9,)), 0.0)
    outputs = []
    for token in tokens:
        if scheduler.has_work:
            outputs += scheduler.update(scheduler.schedule(0.0), [token], 0.0).outputs

    assert [output.token_id for output in outputs] == answer
    assert outputs[-1].finish_reason == reason


def test_fact_26_at_the_end_nothing_is_left() -> None:
    scheduler = make_scheduler(SchedulerConfig(64, 2))
    add_prompts(scheduler, 20, 30, 40)

    finish(scheduler)

    scheduler.check_invariants()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (0, 0, False)
    assert scheduler.manager.memory.pool.num_available == 1000
    assert scheduler.manager.memory.sequences.num_live == 0


def test_fact_27_aborting_ends_waiting_and_running_requests_and_refuses_unknown_ones() -> None:
    scheduler = make_scheduler(SchedulerConfig(64, 1))
    add_prompts(scheduler, 20, 30)
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1], 0.0)

    scheduler.abort("r0", 0.0)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    scheduler.abort("r1", 0.0)
    assert not scheduler.has_work
    with pytest.raises(UnknownIdError, match="r1"):
        scheduler.abort("r1", 0.0)


def test_fact_28_no_more_requests_run_than_there_are_seats() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3))
    add_prompts(scheduler, *[10] * 10)

    scheduler.schedule(0.0)

    assert (scheduler.num_running, scheduler.num_waiting) == (3, 7)


def order_of_admission(policy, priorities: list[float], arrivals: list[float]) -> list[str]:
    scheduler = make_scheduler(SchedulerConfig(1024, 1), policy=policy)
    for i, (priority, arrival) in enumerate(zip(priorities, arrivals, strict=True)):
        scheduler.add(Request(f"r{i}", prompt(10, i), 1, priority=priority), arrival)
    order = []
    while scheduler.has_work:
        plan = scheduler.schedule(10.0)
        order += [seat.request_id for seat in plan.admitted]
        scheduler.update(plan, [1] * len(plan.sampling_rows), 10.0)
    return order


def test_fact_29_lower_priority_values_go_first_and_ties_by_arrival() -> None:
    assert order_of_admission(Priority(ageing_per_s=0), [1, 0, 1, 0], [0, 0, 0, 0]) == ["r1", "r3", "r0", "r2"]


def test_fact_29_first_come_first_served_ignores_priorities() -> None:
    assert order_of_admission(None, [1, 0, 1, 0], [0, 0, 0, 0]) == ["r0", "r1", "r2", "r3"]


def test_ageing_lets_an_old_request_go_before_a_young_one_of_better_priority() -> None:
    priorities, arrivals = [2, 0, 0], [0, 1, 3]

    assert order_of_admission(Priority(ageing_per_s=1.0), priorities, arrivals) == ["r1", "r0", "r2"]


def test_fact_30_a_preempted_request_comes_back_before_those_that_arrived_later() -> None:
    scheduler = make_scheduler(SchedulerConfig(64, 3, watermark=0), num_blocks=4, block_size=4)
    for i in range(3):
        scheduler.add(Request(f"r{i}", prompt(3, i), 9), 0.0)
    admitted = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        admitted += [seat.request_id for seat in plan.admitted]
        scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)

    assert admitted[:3] == ["r0", "r1", "r2"]
    assert admitted[3:] == sorted(admitted[3:])
    assert len(admitted) > 3


def test_fact_12_a_request_that_does_not_read_the_cache_still_fills_it() -> None:
    scheduler = make_scheduler(SchedulerConfig(1024, 3))
    hits = []
    for name, reads in (("a", True), ("b", False), ("c", True)):
        scheduler.add(Request(name, prompt(33), 1, reads_cache=reads), 0.0)
        plan = scheduler.schedule(0.0)
        hits.append(int(plan.starts[0]))
        scheduler.update(plan, [1], 0.0)

    assert hits == [0, 0, 32]


def test_fact_13_a_request_that_waits_counts_one_query_and_a_preempted_one_counts_apart() -> None:
    scheduler = make_scheduler(SchedulerConfig(64, 2, watermark=0), num_blocks=4, block_size=4)
    for i in range(2):
        scheduler.add(Request(f"r{i}", prompt(7, i), 8), 0.0)

    finish(scheduler)

    counters = scheduler.manager.memory.counters
    assert (counters.num_queries, counters.queried_tokens) == (2, 14)
    assert counters.num_resumed_queries == 1
