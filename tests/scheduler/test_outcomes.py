"""What an engine may say of a step: plain tokens, or with rows that it ends; all or nothing."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, StepOutcome


def make_scheduler(*requests: Request) -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(64, 4, watermark=0), KVCacheManager(CacheConfig(8, 4)))
    for request in requests:
        scheduler.add(request, 0.0)
    return scheduler


def ended(events) -> list[tuple[str, int, str]]:
    return [(sample.request.request_id, sample.sample_idx, reason) for sample, reason in events.finished]


def test_a_row_that_the_engine_stops_finishes_with_this_token_and_its_siblings_go_on() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 5, n=3))
    plan = scheduler.schedule(0.0)

    events = scheduler.update(plan, StepOutcome([7, 8, 9], stopped=[False, True, False]), 0.0)

    assert ended(events) == [("a", 1, "stop")]
    assert [tuple(output) for output in events.outputs] == [
        ("a", 0, 7, None),
        ("a", 1, 8, "stop"),
        ("a", 2, 9, None),
    ]
    assert (scheduler.num_running, scheduler.has_work) == (2, True)
    scheduler.check_invariants()


def test_what_came_of_a_step_stays_when_its_rows_have_gone_to_others() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 1), Request("b", [4, 5], 2))
    events = scheduler.update(scheduler.schedule(0.0), [7, 8], 0.0)
    scheduler.add(Request("c", [6], 1), 1.0)

    later = scheduler.update(scheduler.schedule(1.0), [9, 10], 1.0)

    assert [tuple(output) for output in events.outputs] == [("a", 0, 7, "length"), ("b", 0, 8, None)]
    assert [tuple(output) for output in later.outputs] == [("b", 0, 9, "length"), ("c", 0, 10, "length")]


def test_a_request_whose_samples_are_all_stopped_is_over() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 5, n=2))

    scheduler.update(scheduler.schedule(0.0), StepOutcome([7, 8], stopped=np.array([True, True])), 0.0)

    assert not scheduler.has_work
    assert scheduler.manager.statistics().num_used == 0


def test_a_row_that_is_stopped_with_its_last_token_was_stopped() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 1), Request("b", [4, 5], 1))

    events = scheduler.update(scheduler.schedule(0.0), StepOutcome([7, 8], stopped=[False, True]), 0.0)

    assert ended(events) == [("b", 0, "stop"), ("a", 0, "length")]


def test_stopped_rows_and_stop_tokens_are_told_in_order_of_rows() -> None:
    scheduler = make_scheduler(Request("a", [1], 9, stop_token_ids=[7]), Request("b", [2], 9), Request("c", [3], 9))

    events = scheduler.update(scheduler.schedule(0.0), StepOutcome([7, 7, 7], stopped=[False, True, False]), 0.0)

    assert ended(events) == [("a", 0, "stop"), ("b", 0, "stop")]


def test_flags_of_stopped_rows_are_left_as_they_were_passed() -> None:
    scheduler = make_scheduler(Request("a", [1], 9, stop_token_ids=[7]), Request("b", [2], 9))
    flags = np.array([False, True])

    events = scheduler.update(scheduler.schedule(0.0), StepOutcome([7, 7], stopped=flags), 0.0)

    assert ended(events) == [("a", 0, "stop"), ("b", 0, "stop")]
    assert flags.tolist() == [False, True]


def test_stop_tokens_are_those_at_the_time_of_the_request() -> None:
    stops = [7, 8, 7]
    scheduler = make_scheduler(Request("a", [1], 9, stop_token_ids=stops), Request("b", [2], 9, stop_token_ids=(9,)))
    stops[:] = [9]

    events = scheduler.update(scheduler.schedule(0.0), [9, 8], 0.0)

    assert ended(events) == []
    assert ended(scheduler.update(scheduler.schedule(0.0), [7, 8], 0.0)) == [("a", 0, "stop")]


def test_a_token_ends_no_sample_but_those_whose_stop_it_is() -> None:
    scheduler = make_scheduler(Request("a", [1], 9, stop_token_ids=[7]), Request("b", [2], 9))

    # 7 + 4096 is counted in the same bucket as 7, and 7 ends only "a".
    events = scheduler.update(scheduler.schedule(0.0), [7 + 4096, 7], 0.0)

    assert ended(events) == []


def test_stop_tokens_end_a_sample_after_others_with_the_same_ones_are_gone() -> None:
    a, b = (Request(name, [1], 9, stop_token_ids=[7, 2**31 - 1]) for name in "ab")
    scheduler = make_scheduler(a, b)
    scheduler.abort("a", 0.0)

    assert ended(scheduler.update(scheduler.schedule(0.0), [2**31 - 1], 0.0)) == [("b", 0, "stop")]


def test_a_simulated_row_can_be_stopped() -> None:
    scheduler = make_scheduler(Request("a", SimulatedPrompt(3), 5), Request("b", SimulatedPrompt(3), 5))

    events = scheduler.update(scheduler.schedule(0.0), StepOutcome(None, stopped=[True, False]), 0.0)

    assert ended(events) == [("a", 0, "stop")]
    assert scheduler.num_steps_ahead() == 4


def test_a_flag_for_a_row_that_was_aborted_meanwhile_is_passed_over() -> None:
    scheduler = make_scheduler(Request("a", [1], 5), Request("b", [2], 5), Request("c", [3], 5))
    plan = scheduler.schedule(0.0)
    scheduler.abort("a", 0.0)

    events = scheduler.update(plan, StepOutcome([7, 8, 9], [1, 1, 1], [True, False, True]), 0.0)

    assert ended(events) == [("c", 0, "stop")]
    assert [(output.request_id, output.token_id) for output in events.outputs] == [("b", 8), ("c", 9)]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (StepOutcome([7]), "2 rows sample in this step, found 1 tokens"),
        (StepOutcome(None), "token_ids may be None only"),
        (StepOutcome([7, -1]), "token_ids must be in"),
        (StepOutcome([7, 8], [1]), "2 rows sample in this step, found 1 num_tokens"),
        (StepOutcome([7, 8], [1, 0]), r"row 1 gets 1\.\.1 tokens in this step, found 0"),
        (StepOutcome([7, 8, 9], [1, 2]), r"row 1 gets 1\.\.1 tokens in this step, found 2"),
        (StepOutcome([7, 8], [1.0, 1.0]), "num_tokens must be one row of whole numbers"),
        (StepOutcome([7, 8], stopped=[True]), "stopped must be 2 booleans"),
        (StepOutcome([7, 8], stopped=[0, 1]), "stopped must be 2 booleans"),
        (StepOutcome([7, 8], stopped=[[True], [True, False]]), "stopped must be 2 booleans"),
        (StepOutcome([7, 8], stopped=True), "stopped must be 2 booleans"),
    ],
    ids=str,
)
def test_a_wrong_outcome_is_refused_and_the_plan_stays_in_flight(outcome, message) -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 2), Request("b", [4, 5], 2))
    plan = scheduler.schedule(0.0)

    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.update(plan, outcome, 0.0)

    assert scheduler.in_flight is plan
    assert [output.token_id for output in scheduler.update(plan, [7, 8], 0.0).outputs] == [7, 8]
    scheduler.check_invariants()


@pytest.mark.parametrize("plan", [None, 0, "plan"])
def test_what_is_no_plan_is_refused_and_the_plan_stays_in_flight(plan: object) -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 5))
    in_flight = scheduler.schedule(0.0)
    for call in (lambda: scheduler.update(plan, [7], 0.0), lambda: scheduler.fail(plan, 0.0)):
        with pytest.raises(InvalidArgumentError, match="expected the plan in flight, found "):
            call()
    assert scheduler.in_flight is in_flight


def test_the_tokens_so_far_of_each_live_sample_can_be_read() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 5, n=2), Request("b", [4], 5))
    scheduler.update(scheduler.schedule(0.0), [7, 9, 8], 0.0)
    scheduler.update(scheduler.schedule(0.0), [17, 19, 18], 0.0)
    scheduler.add(Request("c", [5], 5), 0.0)

    assert {idx: tokens.tolist() for idx, tokens in scheduler.outputs("a").items()} == {0: [7, 17], 1: [8, 18]}
    assert {idx: tokens.tolist() for idx, tokens in scheduler.outputs("b").items()} == {0: [9, 19]}
    assert {idx: tokens.tolist() for idx, tokens in scheduler.outputs("c").items()} == {0: []}


def test_blocks_of_a_request_that_is_aborted_in_flight_are_nobodys_until_the_step_is_over() -> None:
    scheduler = make_scheduler(Request("a", [9, 9, 9, 9, 9], 5))
    manager = scheduler.manager
    plan = scheduler.schedule(0.0)
    scheduler.abort("a", 0.0)

    manager.open("b", [1] * 64)
    taken = manager.append("b", manager.memory.pool.num_available * manager.config.block_size).slots
    scheduler.check_invariants()

    assert not set(taken.tolist()) & set(plan.slot_mapping.tolist())
    scheduler.fail(plan, 0.0)
    scheduler.check_invariants()
    manager.close("b")
    assert manager.statistics().num_used == 0
