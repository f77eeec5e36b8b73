"""Guessed tokens: who gets them, what a step computes of them, and what is left when some come true and others do not."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt, UnknownIdError
from pagedkv.scheduler import Recompute, Request, Scheduler, SchedulerConfig, StepOutcome, Swap


def make_scheduler(*requests: Request, num_blocks=8, block_size=4, budget=64, seats=4, host=0, **policies) -> Scheduler:
    manager = KVCacheManager(CacheConfig(num_blocks, block_size, host))
    scheduler = Scheduler(SchedulerConfig(budget, seats, watermark=0), manager, **policies)
    for request in requests:
        scheduler.add(request, 0.0)
    return scheduler


def step(scheduler: Scheduler, token: int = 9, drafts=None):
    plan = scheduler.schedule(0.0, drafts)
    scheduler.update(plan, [token] * len(plan.sampling_rows), 0.0)
    scheduler.check_invariants()
    return plan


def decoding(num_new: int = 10, prompt=(1, 2, 3), **more) -> Scheduler:
    """One request in row 0 whose first new token is 9."""
    scheduler = make_scheduler(Request("a", list(prompt), num_new, **more.pop("request", {})), **more)
    step(scheduler)
    return scheduler


def ended(events) -> list[tuple[str, str]]:
    return [(sample.request.request_id, reason) for sample, reason in events.finished]


# What is planned


def test_a_row_computes_its_drafts_behind_its_last_token() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 10), Request("b", [4, 5], 10), Request("c", [6], 10))
    step(scheduler)

    plan = scheduler.schedule(0.0, {2: [7, 8], 0: np.array([5, 6], np.int32)})

    assert plan.rows.tolist() == [0, 1, 2]
    assert plan.num_tokens.tolist() == [3, 1, 3]
    assert plan.starts.tolist() == [3, 2, 1]
    assert plan.seq_lens.tolist() == [6, 3, 4]
    assert plan.token_ids.tolist() == [9, 5, 6, 9, 9, 7, 8]
    assert plan.positions.tolist() == [3, 4, 5, 2, 1, 2, 3]
    assert plan.slot_mapping.tolist() == [3, 12, 13, 6, 9, 10, 11]
    assert plan.num_drafts.tolist() == [2, 0, 2]
    assert plan.drafts.token_ids.tolist() == [5, 6, 7, 8]
    assert plan.sampling_rows.tolist() == [0, 1, 2]
    assert plan.logit_indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    scheduler.check_invariants()


def test_a_plan_without_drafts_says_so() -> None:
    scheduler = decoding()

    for drafts in (None, {}, {0: []}):
        plan = scheduler.schedule(0.0, drafts)
        assert plan.num_drafts is None
        assert plan.logit_indices.tolist() == [0]
        scheduler.update(plan, [9], 0.0)


def test_drafts_beside_a_prompt_of_which_a_chunk_is_computed() -> None:
    scheduler = decoding(budget=8)
    scheduler.add(Request("b", [1, 2, 3, 4, 5, 6], 2), 0.0)

    plan = scheduler.schedule(0.0, {0: [7, 8]})

    assert plan.num_tokens.tolist() == [2, 6]
    assert plan.num_drafts.tolist() == [1, 0]
    assert plan.token_ids.tolist() == [9, 7, 1, 2, 3, 4, 5, 6]
    assert plan.logit_indices.tolist() == [0, 1, 7]


def test_drafts_are_cut_to_the_token_budget_in_order_of_rows() -> None:
    scheduler = make_scheduler(*(Request(name, [1, 2], 9) for name in "abc"), budget=6)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [1, 2], 1: [3, 4], 2: [5, 6]})

    assert plan.num_drafts.tolist() == [2, 1, 0]
    assert plan.token_ids.tolist() == [9, 1, 2, 9, 3, 9]


def test_drafts_are_cut_to_what_the_row_may_still_sample() -> None:
    scheduler = decoding(num_new=4)  # One is there, three are to come: two drafts and the token behind them.

    plan = scheduler.schedule(0.0, {0: [5, 6, 7, 8]})
    events = scheduler.update(plan, StepOutcome([5, 6, 3], [3]), 0.0)

    assert plan.num_drafts.tolist() == [2]
    assert ended(events) == [("a", "length")]
    assert [output.token_id for output in events.outputs] == [5, 6, 3]
    assert [output.finish_reason for output in events.outputs] == [None, None, "length"]


def test_a_row_whose_next_token_is_its_last_takes_no_drafts() -> None:
    assert decoding(num_new=2).schedule(0.0, {0: [5]}).num_drafts is None


def test_a_row_with_more_than_one_token_to_compute_takes_no_drafts() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3, 4, 5, 6], 4), budget=4)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [7]})

    assert (plan.num_tokens.tolist(), plan.num_drafts) == ([2], None)


def test_a_row_that_is_about_to_fork_takes_no_drafts() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3, 4, 5], 4, n=2), budget=4)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [7]})

    assert (plan.num_tokens.tolist(), plan.sampling_rows.tolist(), plan.num_drafts) == ([1], [0, 1], None)


def test_samples_that_share_their_last_block_copy_it_before_their_drafts_are_written() -> None:
    scheduler = make_scheduler(Request("a", [1, 2], 9, n=2))
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [5], 1: [6]})

    assert (plan.copies.sources.tolist(), plan.copies.targets.tolist()) == ([0], [1])
    assert plan.slot_mapping.tolist() == [6, 7, 2, 3]
    scheduler.update(plan, StepOutcome([5, 3, 8], [2, 1]), 0.0)
    scheduler.check_invariants()
    assert scheduler.schedule(0.0).copies.targets.tolist() == []


@pytest.mark.parametrize(
    ("drafts", "error", "message"),
    [
        ({7: [1]}, UnknownIdError, "row 7, in which nothing runs"),
        ({1000: [1]}, UnknownIdError, "row 1000, in which nothing runs"),
        ({-1: [1]}, UnknownIdError, "row -1, in which nothing runs"),
        ({"a": [1]}, InvalidArgumentError, "by row, a whole number, found 'a'"),
        ({True: [1]}, InvalidArgumentError, "by row, a whole number, found True"),
        ({1: [1]}, InvalidArgumentError, "row 1, whose tokens are simulated"),
        ({0: [-1]}, InvalidArgumentError, "drafts must be in"),
        ({0: [2**31]}, InvalidArgumentError, "drafts must be in"),
        ({0: [0.5]}, InvalidArgumentError, "drafts must be one row of whole numbers"),
        ({0: "text"}, InvalidArgumentError, "drafts must be one row of whole numbers"),
        ({0: 5}, InvalidArgumentError, "must be a sequence of token ids"),
        ({0: [[1, 2]]}, InvalidArgumentError, "drafts must be one row of whole numbers"),
        ([1, 2], InvalidArgumentError, "drafts must map rows to tokens, found list"),
    ],
    ids=str,
)
def test_wrong_drafts_are_refused_and_nothing_is_planned(drafts, error, message) -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 10), Request("b", SimulatedPrompt(3), 10))
    step(scheduler)

    with pytest.raises(error, match=message):
        scheduler.schedule(0.0, drafts)

    assert scheduler.in_flight is None
    assert scheduler.schedule(0.0).step == 1


# Who goes first


def test_drafts_that_find_no_block_are_dropped_and_preempt_nobody() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 5), Request("b", [4, 5, 6], 5), num_blocks=2)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [7, 8], 1: [7, 8]})

    assert (plan.num_tokens.tolist(), plan.num_drafts, scheduler.num_running) == ([1, 1], None, 2)
    scheduler.check_invariants()


def test_where_blocks_are_short_each_row_keeps_the_drafts_that_fit_into_its_own_blocks() -> None:
    scheduler = make_scheduler(*(Request(name, [1, 2], 9) for name in "ab"), Request("c", [3, 4, 5], 9), num_blocks=3)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [7, 8, 8], 1: [7, 8, 8], 2: [7, 8, 8]})

    assert plan.num_drafts.tolist() == [1, 1, 0]
    scheduler.update(plan, StepOutcome([7, 1, 2, 3], [2, 1, 1]), 0.0)
    scheduler.check_invariants()


def test_the_last_blocks_go_to_the_drafts_of_the_rows_that_come_first() -> None:
    scheduler = make_scheduler(*(Request(name, [1, 2], 14) for name in "ab"), num_blocks=4)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: list(range(6)), 1: list(range(9))})

    assert plan.num_drafts.tolist() == [6, 1]  # Of row 0 the last lies in a third block, the last one there is.
    scheduler.check_invariants()


def test_a_waiting_request_gets_its_block_before_drafts_do() -> None:
    scheduler = decoding(num_new=5, num_blocks=2)
    scheduler.add(Request("b", [4, 5], 2), 0.0)

    plan = scheduler.schedule(0.0, {0: [7, 8]})

    assert [seat.request_id for seat in plan.admitted] == ["b"]
    assert plan.num_drafts is None


def test_a_step_that_preempts_takes_no_drafts() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3, 4], 5), Request("b", [4, 5, 6, 7], 5), num_blocks=4, block_size=2)
    step(scheduler)

    plan = scheduler.schedule(0.0, {0: [7], 1: [7]})

    assert scheduler.num_running == 1
    assert (plan.num_tokens.tolist(), plan.num_drafts) == ([1], None)


def test_drafts_may_take_blocks_that_are_only_cached() -> None:
    scheduler = make_scheduler(Request("old", [1, 2, 3, 4, 5], 1), Request("a", [6, 7, 8], 8), num_blocks=3)
    step(scheduler)  # old ends and leaves one block in the cache, another is free
    assert scheduler.manager.statistics().num_evictable == 1

    plan = scheduler.schedule(0.0, {1: [1, 2, 3, 4, 5]})

    assert plan.num_drafts.tolist() == [5]
    assert scheduler.manager.statistics().num_used == 3


# What comes of them


def test_accepted_drafts_and_the_token_behind_them_are_known_and_the_rest_is_taken_back() -> None:
    scheduler = decoding()
    plan = scheduler.schedule(0.0, {0: [5, 6, 7, 8, 8]})
    assert scheduler.manager.statistics().num_used == 3

    events = scheduler.update(plan, StepOutcome([5, 6, 4], [3]), 0.0)

    assert [tuple(output) for output in events.outputs] == [("a", 0, 5, None), ("a", 0, 6, None), ("a", 0, 4, None)]
    assert (events.rows.tolist(), events.num_tokens.tolist(), events.token_ids.tolist()) == ([0], [3], [5, 6, 4])
    scheduler.check_invariants()
    assert scheduler.manager.statistics().num_used == 2
    again = scheduler.schedule(0.0)
    assert (again.starts.tolist(), again.token_ids.tolist(), again.slot_mapping.tolist()) == ([6], [4], [6])


def test_when_all_drafts_are_wrong_the_row_stands_where_it_would_stand_without_them() -> None:
    scheduler = decoding()

    scheduler.update(scheduler.schedule(0.0, {0: [5, 6, 7]}), [4], 0.0)

    scheduler.check_invariants()
    assert scheduler.manager.statistics().num_used == 1
    again = scheduler.schedule(0.0)
    assert (again.starts.tolist(), again.token_ids.tolist()) == ([4], [4])


def num_named(scheduler: Scheduler) -> int:
    scheduler.manager.memory.naming.catch_up()
    return len(scheduler.manager.memory.cache)


def test_a_block_that_drafts_fill_is_named_only_when_they_are_accepted() -> None:
    scheduler = decoding(prompt=[1, 2, 3, 4])
    plan = scheduler.schedule(0.0, {0: [5, 6, 7]})
    assert num_named(scheduler) == 1

    scheduler.update(plan, StepOutcome([5, 6, 7, 8], [4]), 0.0)

    assert num_named(scheduler) == 2
    assert scheduler.manager.lookup([1, 2, 3, 4, 9, 5, 6, 7, 1]).num_tokens == 8
    scheduler.check_invariants()


def test_a_block_that_a_wrong_draft_completed_has_no_name() -> None:
    scheduler = decoding(prompt=[1, 2, 3, 4])
    plan = scheduler.schedule(0.0, {0: [5, 6, 7]})

    scheduler.update(plan, StepOutcome([5, 6, 3], [3]), 0.0)

    assert num_named(scheduler) == 1
    step(scheduler)  # The right token fills the block after all.
    assert num_named(scheduler) == 2
    assert scheduler.manager.lookup([1, 2, 3, 4, 9, 5, 6, 3, 1]).num_tokens == 8


def test_drafts_that_fill_several_blocks_name_them_all() -> None:
    scheduler = decoding(prompt=[1, 2, 3], block_size=2)
    plan = scheduler.schedule(0.0, {0: [5, 6, 7, 8, 8]})
    assert num_named(scheduler) == 2

    scheduler.update(plan, StepOutcome([5, 6, 7, 8, 8, 1], [6]), 0.0)

    assert num_named(scheduler) == 4
    assert scheduler.manager.lookup([1, 2, 3, 9, 5, 6, 7, 8, 8]).num_tokens == 8


def test_what_comes_behind_a_stop_token_is_dropped() -> None:
    scheduler = decoding(request={"stop_token_ids": [6]}, block_size=2)
    plan = scheduler.schedule(0.0, {0: [5, 6, 7, 8]})

    events = scheduler.update(plan, StepOutcome([5, 6, 7, 8, 4], [5]), 0.0)

    assert [(output.token_id, output.finish_reason) for output in events.outputs] == [(5, None), (6, "stop")]
    assert (events.num_tokens.tolist(), events.token_ids.tolist()) == ([2], [5, 6])
    assert ended(events) == [("a", "stop")]
    # The K/V of 5 is there, that of the stop token is not known to be: 1 2 3 9 5 are two full blocks.
    assert scheduler.manager.statistics().num_evictable == 2
    assert not scheduler.has_work


def test_the_engine_stops_a_row_with_its_accepted_drafts() -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 10, n=2))
    step(scheduler)
    plan = scheduler.schedule(0.0, {0: [5, 6], 1: [5, 6]})

    events = scheduler.update(plan, StepOutcome([5, 6, 7, 5, 8], [3, 2], [False, True]), 0.0)

    assert [(output.sample_idx, output.token_id, output.finish_reason) for output in events.outputs] == [
        (0, 5, None),
        (0, 6, None),
        (0, 7, None),
        (1, 5, None),
        (1, 8, "stop"),
    ]
    assert scheduler.num_running == 1


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (StepOutcome([5, 6, 7, 1, 2], [4, 1]), r"row 0 gets 1\.\.3 tokens in this step, found 4"),
        (StepOutcome([5, 7, 7], [2, 2]), r"row 1 gets 1\.\.1 tokens in this step, found 2"),
        (StepOutcome([7, 7], [0, 2]), r"row 0 gets 1\.\.3 tokens in this step, found 0"),
        (StepOutcome([4, 6, 7, 1], [3, 1]), "row 0: all new tokens but the last must equal its drafts, one does not"),
        (StepOutcome([5, 4, 7, 1], [3, 1]), "row 0: all new tokens but the last must equal its drafts, one does not"),
        (StepOutcome([5, 6, 7], [3, 1]), "num_tokens add up to 4, found 3 tokens"),
        ([1, 2, 3], "num_tokens add up to 2, found 3 tokens"),
    ],
    ids=str,
)
def test_tokens_that_the_drafts_do_not_allow_are_refused_and_the_plan_stays_in_flight(outcome, message) -> None:
    scheduler = make_scheduler(Request("a", [1, 2, 3], 10), Request("b", [1, 2, 3], 10))
    step(scheduler)
    plan = scheduler.schedule(0.0, {0: [5, 6]})

    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.update(plan, outcome, 0.0)

    assert scheduler.update(plan, StepOutcome([5, 7, 8], [2, 1]), 0.0).num_tokens.tolist() == [2, 1]
    scheduler.check_invariants()


def test_proposed_and_accepted_drafts_are_counted() -> None:
    scheduler = decoding(request={"stop_token_ids": [6]})
    scheduler.update(scheduler.schedule(0.0, {0: [5, 7]}), StepOutcome([5, 3], [2]), 0.0)
    assert (scheduler.draft_counters.num_drafts, scheduler.draft_counters.num_accepted_drafts) == (2, 1)
    scheduler.fail(scheduler.schedule(0.0, {0: [5, 7]}), 0.0)
    scheduler.update(scheduler.schedule(0.0, {0: [5, 6, 7]}), StepOutcome([5, 6, 7], [3]), 0.0)

    assert (scheduler.draft_counters.num_drafts, scheduler.draft_counters.num_accepted_drafts) == (5, 2)


# When a step with drafts goes wrong


def test_a_failed_step_forgets_its_drafts_and_is_planned_again() -> None:
    scheduler = decoding(prompt=[1, 2, 3, 4])
    plan = scheduler.schedule(0.0, {0: [5, 6, 7, 8]})

    scheduler.fail(plan, 0.0, "lost")

    scheduler.check_invariants()
    assert num_named(scheduler) == 1
    assert scheduler.manager.statistics().num_used == 1
    again = scheduler.schedule(0.0)
    assert (again.starts.tolist(), again.token_ids.tolist(), again.num_drafts) == ([4], [9], None)


def test_a_request_with_drafts_in_flight_is_aborted_and_the_others_get_their_tokens() -> None:
    scheduler = make_scheduler(*(Request(name, [1, 2, 3], 9) for name in "abc"), num_blocks=12)
    step(scheduler)
    plan = scheduler.schedule(0.0, {0: [4, 5], 1: [5, 6], 2: [6, 7]})

    scheduler.abort("b", 0.0)
    scheduler.check_invariants()

    assert plan.token_ids.tolist() == [9, 4, 5, 9, 5, 6, 9, 6, 7]
    events = scheduler.update(plan, StepOutcome([4, 8, 5, 6, 7, 6, 7, 3], [2, 3, 3]), 0.0)
    assert [(output.request_id, output.token_id) for output in events.outputs] == [
        ("a", 4),
        ("a", 8),
        ("c", 6),
        ("c", 7),
        ("c", 3),
    ]
    scheduler.check_invariants()
    assert scheduler.draft_counters.num_drafts == 4


@pytest.mark.parametrize("preemption", [Recompute(), Swap()], ids=["recompute", "swap"])
def test_a_row_that_took_drafts_can_be_preempted_and_comes_back(preemption) -> None:
    scheduler = make_scheduler(
        Request("a", [1, 2, 3], 9), Request("b", [4, 5, 6], 9), num_blocks=4, host=4, preemption=preemption
    )
    step(scheduler)
    for _ in range(50):
        if scheduler.has_work:
            plan = scheduler.schedule(0.0, {row: [9] for row in scheduler.running_rows.tolist()})
            counts = np.ones(len(plan.sampling_rows), int) if plan.num_drafts is None else plan.num_drafts + 1
            scheduler.update(plan, StepOutcome([9] * int(counts.sum()), counts), 0.0)
            scheduler.check_invariants()

    assert not scheduler.has_work
    assert scheduler.manager.statistics().num_used == 0
    assert scheduler.manager.memory.host_pool.num_used == 0
