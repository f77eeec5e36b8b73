"""What the scheduler promises beyond the order of work: plans, fairness, failure, logs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from small_scheduler import Events, finish, make_scheduler, request, running_ids, step

from pagedkv import (
    InvalidArgumentError,
    SimulatedPrompt,
    StalePlanError,
)
from pagedkv.scheduler import (
    EventLog,
    Recompute,
    Request,
    Swap,
)

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


def test_the_arrays_that_attention_takes_have_its_types() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 2), 0.0)

    plan = scheduler.schedule(0.0)

    assert plan.seq_lens.dtype == plan.query_start_loc.dtype == scheduler.block_tables.dtype == "int32"
    assert plan.slot_mapping.dtype == "int64"


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
