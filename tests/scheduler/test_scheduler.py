"""What the scheduler promises beyond the order of work: refusals, fairness, preemption, failure, typed errors."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    ConfigError,
    DuplicateIdError,
    InvalidArgumentError,
    KVCacheManager,
    SimulatedPrompt,
    StalePlanError,
)
from pagedkv.scheduler import (
    Cheaper,
    EventLog,
    LowestPriority,
    PreemptionMode,
    Priority,
    Recompute,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    Swap,
)


class Events(list):
    """A sink that keeps the events."""

    def emit(self, event) -> None:
        self.append(event)

    def named(self, name: str) -> list:
        return [event for event in self if type(event).__name__ == name]


def make_scheduler(*, num_blocks=8, block_size=4, budget=64, seats=4, host=0, watermark=0.0, config=None, **policies):
    cache = CacheConfig(num_blocks, block_size, host)
    config = SchedulerConfig(budget, seats, watermark=watermark, **(config or {}))
    return Scheduler(config, KVCacheManager(cache), **policies)


def request(name: str, num_prompt: int, num_new: int, **more) -> Request:
    first = sum(name.encode()) * 1000
    return Request(name, [first + i for i in range(num_prompt)], num_new, **more)


def step(scheduler: Scheduler):
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)
    return plan


def finish(scheduler: Scheduler, max_steps: int = 500) -> int:
    for num_steps in range(max_steps):
        if not scheduler.has_work:
            return num_steps
        step(scheduler)
        scheduler.check_invariants()
    raise AssertionError("not done")


def running_ids(scheduler: Scheduler) -> list[str]:
    return [sample.request.request_id for sample in scheduler._running.samples[scheduler._running.rows]]


# Refusals


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic() -> None:
    sink = Events()
    scheduler = make_scheduler(sink=sink)

    with pytest.raises(RequestTooLargeError, match="30 prompt \\+ 4 new tokens need 9 blocks of 4, the pool has 8"):
        scheduler.add(request("a", 30, 4), 0.0)

    assert not scheduler.has_work
    assert [event.request_id for event in sink.named("Refused")] == ["a"]


def test_a_request_that_fills_the_pool_exactly_runs() -> None:
    scheduler = make_scheduler()
    # 29 + 4 - 1 = 32 tokens: the K/V of the last token is never computed.
    scheduler.add(request("a", 29, 4), 0.0)

    assert finish(scheduler) == 4


def test_more_samples_than_seats_are_refused() -> None:
    with pytest.raises(RequestTooLargeError, match="5 samples need as many seats, there are 4"):
        make_scheduler().add(request("a", 3, 4, n=5), 0.0)


def test_without_chunked_prefill_a_request_longer_than_the_budget_is_refused() -> None:
    scheduler = make_scheduler(budget=8, config={"chunked_prefill": False})

    with pytest.raises(RequestTooLargeError, match="up to 9 tokens must be computed in one step"):
        scheduler.add(request("a", 6, 4), 0.0)


def test_a_duplicate_id_changes_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 4), 0.0)

    with pytest.raises(DuplicateIdError, match="'a' is live already"):
        scheduler.add(request("a", 5, 1), 0.0)

    assert scheduler.num_waiting == 1
    finish(scheduler)
    scheduler.add(request("a", 3, 4), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_id": ""},
        {"request_id": 7},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [2**31]},
        {"prompt": [1.5]},
        {"prompt": [float("nan")]},
        {"max_new_tokens": -1},
        {"max_new_tokens": True},
        {"max_new_tokens": 2**40},
        {"n": 0},
        {"n": 10**6},
        {"priority": float("nan")},
        {"salt": b"x" * 65},
        {"salt": "text"},
        {"adapter": 3},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": list(range(2000))},
    ],
    ids=str,
)
def test_a_wrong_request_is_one_typed_error_and_changes_nothing(wrong) -> None:
    scheduler = make_scheduler()
    fields = {"request_id": "a", "prompt": [1, 2], "max_new_tokens": 1, **wrong}

    with pytest.raises(InvalidArgumentError):
        scheduler.add(Request(**fields), 0.0)

    assert not scheduler.has_work


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": 10, "max_num_running": 11},
        {"max_num_running": -1},
        {"watermark": 1.0},
        {"watermark": float("nan")},
        {"long_prefill_tokens": 0},
        {"long_prefill_tokens": 9, "chunked_prefill": False},
        {"max_bypasses": -1},
        {"max_num_running": 2.0},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        SchedulerConfig(**wrong)


@pytest.mark.parametrize("now", [float("nan"), float("inf"), "0", None], ids=str)
def test_a_time_that_is_no_number_is_refused_and_changes_nothing(now) -> None:
    scheduler = make_scheduler(policy=Priority())
    scheduler.add(request("a", 3, 4), 0.0)
    plan = scheduler.schedule(0.0)

    for call in (
        lambda: scheduler.add(request("b", 3, 4), now),
        lambda: scheduler.abort("a", now),
        lambda: scheduler.update(plan, [1], now),
        lambda: scheduler.fail(plan, now),
        lambda: scheduler.schedule(now),
    ):
        with pytest.raises(InvalidArgumentError, match="now must be a finite number"):
            call()

    assert (scheduler.in_flight, scheduler.num_running, scheduler.num_waiting) == (plan, 1, 0)
    scheduler.check_invariants()
    scheduler.update(plan, [1], 0.0)


# Plans


def test_a_plan_must_be_updated_before_the_next_is_made_and_only_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 4), 0.0)
    plan = scheduler.schedule(0.0)

    with pytest.raises(StalePlanError, match="step 0 is in flight"):
        scheduler.schedule(0.0)
    scheduler.update(plan, [1], 0.0)
    with pytest.raises(StalePlanError, match="step 0 is not in flight"):
        scheduler.update(plan, [1], 0.0)


@pytest.mark.parametrize("tokens", [[], [1, 2], [-1], [2**31], None, [1.5], ["a"]], ids=str)
def test_wrong_tokens_are_refused_and_the_plan_stays_in_flight(tokens) -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 2), 0.0)
    plan = scheduler.schedule(0.0)

    with pytest.raises(InvalidArgumentError):
        scheduler.update(plan, tokens, 0.0)

    scheduler.update(plan, [1], 0.0)
    assert finish(scheduler) == 1


def test_packed_arrays_of_a_mixed_step() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add(Request("a", [1, 2, 3], 3), 0.0)
    step(scheduler)
    scheduler.add(Request("b", [4, 5, 6, 7, 8, 9], 3), 0.0)

    plan = scheduler.schedule(0.0)

    assert plan.num_tokens.tolist() == [1, 5]
    assert plan.starts.tolist() == [3, 0]
    assert plan.token_ids.tolist() == [1, 4, 5, 6, 7, 8]
    assert plan.query_start_loc.tolist() == [0, 1, 6]
    assert plan.seq_lens.tolist() == [4, 5]
    assert plan.positions.tolist() == [3, 0, 1, 2, 3, 4]
    assert plan.slot_mapping.tolist() == [3, 4, 5, 6, 7, 8]
    assert plan.sampling_rows.tolist() == [plan.rows[0]]
    assert plan.logit_indices.tolist() == [0]


def test_packed_arrays_cannot_be_made_once_the_tables_have_moved_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 2), 0.0)
    plan = step(scheduler)

    with pytest.raises(StalePlanError, match="before updating it"):
        _ = plan.slot_mapping


def test_a_plan_keeps_its_packed_arrays_when_a_row_of_it_is_aborted() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2, 3], 2), 0.0)
    scheduler.add(Request("b", [4, 5], 2), 0.0)
    plan = scheduler.schedule(0.0)

    scheduler.abort("a", 0.0)

    assert plan.token_ids.tolist() == [1, 2, 3, 4, 5]
    events = scheduler.update(plan, [8, 9], 0.0)
    assert [(output.request_id, output.token_id) for output in events.outputs] == [("b", 9)]


def test_a_request_for_no_new_tokens_computes_its_prompt_and_ends() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(request("a", 6, 0), 0.0)

    plans = [step(scheduler), step(scheduler)]

    assert [plan.num_tokens.tolist() for plan in plans] == [[4], [2]]
    assert [len(plan.sampling_rows) for plan in plans] == [0, 0]
    assert not scheduler.has_work


def test_requests_of_one_step_share_the_blocks_that_the_first_of_them_fills() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2, 3, 4, 5], 1), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 4, 6], 1), 0.0)

    plan = scheduler.schedule(0.0)

    assert plan.starts.tolist() == [0, 4]
    assert scheduler.block_tables[plan.rows, 0].tolist() == [0, 0]


def test_samples_of_one_request_share_its_prompt_and_copy_only_the_block_that_they_write() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2, 3, 4, 5], 3, n=3), 0.0)

    first = scheduler.schedule(0.0)
    assert (len(first.rows), len(first.sampling_rows), first.sampling_sources.tolist()) == (1, 3, [0, 0, 0])
    assert [seat.sample_idx for seat in first.admitted] == [0, 1, 2]
    scheduler.update(first, [1, 2, 3], 0.0)
    second = scheduler.schedule(0.0)

    assert len(second.copies) == 2
    assert scheduler.manager.statistics().num_used == 1 + 3


# Fairness


def test_a_request_that_does_not_fit_lets_only_so_many_pass() -> None:
    scheduler = make_scheduler(num_blocks=8, seats=8, config={"max_bypasses": 2})
    scheduler.add(request("runs", 12, 16), 0.0)
    step(scheduler)
    scheduler.add(request("large", 24, 1), 0.0)
    for i in range(4):
        scheduler.add(request(f"small{i}", 2, 1), 0.0)

    step(scheduler)

    assert running_ids(scheduler) == ["runs"]
    ended = {"small0", "small1"}
    assert {sample.request.request_id for sample in scheduler._queue} == {"large", "small2", "small3"}
    assert ended.isdisjoint(scheduler._live)
    order = []
    while scheduler.has_work:
        plan = step(scheduler)
        order += [seat.request_id for seat in plan.admitted]
    assert order == ["large", "small2", "small3"]


def test_an_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    scheduler = make_scheduler(num_blocks=10, watermark=0.2)
    scheduler.add(request("a", 8 * 4, 1), 0.0)
    scheduler.add(request("b", 4, 1), 0.0)

    assert len(scheduler.schedule(0.0).rows) == 1


def test_the_reason_for_not_admitting_is_told_once() -> None:
    sink = Events()
    scheduler = make_scheduler(seats=1, sink=sink)
    scheduler.add(request("a", 3, 6), 0.0)
    scheduler.add(request("b", 3, 1), 0.0)

    finish(scheduler)

    assert [(event.request_id, event.reason) for event in sink.named("Deferred")] == [("b", "no seat")]


# Preemption


def test_blocks_run_short_and_the_latest_arrival_is_preempted() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=4, sink=sink)
    scheduler.add(request("a", 7, 9), 0.0)
    scheduler.add(request("b", 7, 9), 0.0)

    finish(scheduler)

    preempted = sink.named("Preempted")
    assert {event.request_id for event in preempted} == {"b"}
    assert (preempted[0].mode, preempted[0].num_computed_tokens) == ("recompute", 8)
    assert (preempted[0].num_used_before, preempted[0].num_used_after) == (4, 2)


def test_under_priorities_the_least_important_is_preempted() -> None:
    sink = Events()
    order = {"policy": Priority(ageing_per_s=0), "victim": LowestPriority()}
    scheduler = make_scheduler(num_blocks=4, sink=sink, **order)
    scheduler.add(request("a", 7, 9, priority=2), 0.0)
    scheduler.add(request("b", 7, 9, priority=1), 0.0)

    finish(scheduler)

    assert {event.request_id for event in sink.named("Preempted")} == {"a"}


def test_only_as_many_lose_their_seat_as_blocks_are_needed() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=6, sink=sink)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 7, 2), 0.0)

    step(scheduler)
    step(scheduler)

    assert len(sink.named("Preempted")) == 0
    scheduler = make_scheduler(num_blocks=6, sink=sink)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 7, 3), 0.0)
    for _ in range(3):
        step(scheduler)
    assert [event.request_id for event in sink.named("Preempted")] == ["c"]


def test_a_sample_that_came_back_is_not_thrown_out_before_it_fills_a_block() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=8, sink=sink)
    manager = scheduler.manager
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 16), 0.0)
    step(scheduler)
    manager.open("other", [9] * 24)
    manager.append("other", manager.memory.pool.num_free * 4)
    while not sink.named("Preempted"):
        step(scheduler)
    manager.close("other")
    manager.reset_prefix_cache()
    step(scheduler)  # b comes back
    manager.open("other", [8] * 24)
    manager.append("other", manager.memory.pool.num_available * 4)
    while len(sink.named("Preempted")) < 2:
        step(scheduler)

    assert [event.request_id for event in sink.named("Preempted")] == ["b", "a"]


@pytest.mark.parametrize("policy", [Swap(), Recompute()], ids=["swap", "recompute"])
def test_swapping_computes_no_token_twice_and_recomputing_needs_no_host(policy) -> None:
    scheduler = make_scheduler(num_blocks=5, host=8, preemption=policy)
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 9), 0.0)
    num_computed = num_swapped = 0
    while scheduler.has_work:
        plan = step(scheduler)
        num_computed += int(plan.num_tokens.sum())
        num_swapped += len(plan.swaps_out)

    needed = 2 * (7 + 9 - 1)
    assert (num_computed == needed) == isinstance(policy, Swap)
    assert (num_swapped > 0) == isinstance(policy, Swap)
    assert scheduler.manager.memory.host_pool.num_used == 0


def test_a_full_host_pool_means_recompute() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=4, host=1, preemption=Swap(), sink=sink)
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 9), 0.0)

    finish(scheduler)

    assert {event.mode for event in sink.named("Preempted")} == {"recompute"}


def test_the_cheaper_mode_follows_the_two_costs() -> None:
    policy = Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=5.0)

    assert policy.choose(num_computed_tokens=9, num_blocks=1) is PreemptionMode.RECOMPUTE
    assert policy.choose(num_computed_tokens=11, num_blocks=1) is PreemptionMode.SWAP


# Abort and failure


def test_two_simulated_requests_of_one_plan_are_aborted_one_after_the_other() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(Request(name, SimulatedPrompt(6), 2), 0.0)
    plan = scheduler.schedule(0.0)

    scheduler.abort("a", 0.0)
    scheduler.abort("b", 0.0)

    scheduler.update(plan, None, 0.0)
    assert not scheduler.has_work


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "in flight", "preempted", "swapped"])
def test_abort_in_every_state_leaves_nothing(state) -> None:
    preemption = Swap() if state == "swapped" else Recompute()
    scheduler = make_scheduler(num_blocks=4, budget=4, host=4, preemption=preemption)
    plan = None
    if state in ("preempted", "swapped"):
        scheduler.add(request("other", 7, 9), 0.0)
    scheduler.add(request("a", 7, 9), 0.0)
    if state == "prefilling":
        step(scheduler)
    elif state == "decoding":
        step(scheduler), step(scheduler), step(scheduler)
    elif state == "in flight":
        plan = scheduler.schedule(0.0)
    elif state in ("preempted", "swapped"):
        while not (scheduler.num_waiting and scheduler.num_running and scheduler._live["a"][0].num_preemptions):
            step(scheduler)

    scheduler.abort("a", 0.0)

    if plan is not None:
        scheduler.update(plan, [], 0.0)
    scheduler.check_invariants()
    finish(scheduler)
    assert scheduler.manager.statistics().num_used == 0
    assert scheduler.manager.memory.host_pool.num_used == 0


def test_a_failed_step_is_planned_again_and_leaves_no_name_of_unwritten_blocks() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(Request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], 2), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 4, 9], 2), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan.starts.tolist() == [0, 4]

    scheduler.fail(plan, 0.0, "out of memory")

    scheduler.check_invariants()
    assert len(scheduler.manager.memory.cache) == 0
    again = scheduler.schedule(0.0)
    assert again.starts.tolist() == [0, 0]
    assert [seat.request_id for seat in again.admitted] == ["a", "b"]


# Logs


def test_the_event_log_is_json_lines_without_tokens_or_salts() -> None:
    file = io.StringIO()
    scheduler = make_scheduler(sink=EventLog(file))
    canary = 77_777_777
    scheduler.add(Request("a", [canary] * 5, 2, salt=b"secret-canary"), 0.0)
    finish(scheduler)

    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["added", "admitted", "finished"]
    assert str(canary) not in file.getvalue()
    assert "secret" not in file.getvalue()


def test_a_simulated_prompt_shares_blocks_by_its_ids() -> None:
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add(Request("a", SimulatedPrompt(9, [5, 6, 7], 4), 1), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(10, np.array([5, 6, 8]), 4), 1), 0.0)

    assert scheduler.schedule(0.0).starts.tolist() == [0, 8]
