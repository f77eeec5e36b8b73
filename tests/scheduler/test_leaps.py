"""How far ahead a scheduler can see, and what taking those steps at once does."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt, StalePlanError
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig


def make_scheduler(*, num_blocks: int = 8, seats: int = 2) -> Scheduler:
    """Blocks of two tokens, sixteen tokens a step."""
    return Scheduler(SchedulerConfig(16, seats, watermark=0.0), KVCacheManager(CacheConfig(num_blocks, 2)))


def step(scheduler: Scheduler) -> None:
    scheduler.update(scheduler.schedule(0.0), None, 0.0)


@pytest.fixture
def scheduler() -> Scheduler:
    """`a` with prompt 3 and 4 new tokens, `b` with prompt 1 and 6; both have computed their prompts."""
    scheduler = make_scheduler()
    scheduler.add(Request("a", SimulatedPrompt(3), 4), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(1), 6), 0.0)
    step(scheduler)
    return scheduler


def test_the_steps_ahead_end_with_the_first_sample_that_ends(scheduler: Scheduler) -> None:
    assert scheduler.num_steps_ahead() == 3  # `a` has one of its four tokens.


def test_the_steps_ahead_end_where_blocks_run_out() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(Request("a", SimulatedPrompt(3), 4), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(1), 6), 0.0)
    step(scheduler)
    # Three blocks are held, with room for a's token 4 and b's token 2; tokens 5 and 3 take the last two, 7 and 5 none.
    assert scheduler.num_steps_ahead() == 3
    scheduler.leap(2, 1.0)
    assert scheduler.manager.memory.pool.num_free == 0


def test_a_leap_tells_what_its_last_step_brought_and_the_blocks_used_in_each(scheduler: Scheduler) -> None:
    events, used = scheduler.leap(3, 5.0)

    assert used.tolist() == [3, 5, 5]
    assert events.finished_ids == ["a"]
    assert (scheduler.num_running, scheduler.manager.memory.pool.num_used) == (1, 2)
    scheduler.check_invariants()


def test_a_leap_counts_as_its_steps(scheduler: Scheduler) -> None:
    scheduler.leap(3, 5.0)

    assert scheduler.schedule(5.0).step == 4


def test_the_steps_of_a_leap_may_be_a_number_of_numpy(scheduler: Scheduler) -> None:
    scheduler.leap(np.int64(3), 5.0)

    assert type(scheduler.schedule(5.0).step) is int


def test_the_steps_ahead_end_where_admission_opens_again() -> None:
    scheduler = Scheduler(
        SchedulerConfig(16, 2, watermark=0.0, admission_interval=4), KVCacheManager(CacheConfig(16, 2))
    )
    scheduler.add(Request("a", SimulatedPrompt(1), 12), 0.0)
    step(scheduler)
    scheduler.add(Request("b", SimulatedPrompt(1), 2), 0.0)
    assert (scheduler.num_steps_ahead(), scheduler.num_waiting) == (3, 1)


def test_after_a_leap_that_ended_a_sample_the_others_go_on_without_a_plan(scheduler: Scheduler) -> None:
    scheduler.leap(3, 5.0)

    assert scheduler.num_steps_ahead() == 2
    events, used = scheduler.leap(2, 7.0)
    assert (events.finished_ids, used.tolist()) == (["b"], [3, 3])
    assert not scheduler.has_work


def test_nothing_is_sure_while_a_step_is_in_flight(scheduler: Scheduler) -> None:
    plan = scheduler.schedule(0.0)

    assert scheduler.num_steps_ahead() == 0
    with pytest.raises(StalePlanError, match="step 1 is in flight"):
        scheduler.leap(1, 1.0)
    scheduler.update(plan, None, 1.0)
    assert scheduler.num_steps_ahead() == 2


def test_nothing_is_sure_once_a_request_that_could_be_admitted_waits(scheduler: Scheduler) -> None:
    scheduler.add(Request("c", SimulatedPrompt(1), 1), 0.0)

    assert scheduler.num_steps_ahead() == 0


def test_a_request_that_waits_for_a_seat_does_not_keep_others_from_leaping(scheduler: Scheduler) -> None:
    scheduler.add(Request("c", SimulatedPrompt(1), 1), 0.0)
    step(scheduler)

    assert scheduler.num_steps_ahead() == 2


def test_nothing_is_sure_while_a_prompt_is_computed() -> None:
    scheduler = make_scheduler(num_blocks=20)
    scheduler.add(Request("a", SimulatedPrompt(20), 2), 0.0)
    step(scheduler)

    assert scheduler.num_steps_ahead() == 0


def test_nothing_is_sure_before_the_first_step_and_of_real_tokens() -> None:
    scheduler = make_scheduler()
    assert scheduler.num_steps_ahead() == 0
    scheduler.add(Request("a", [1, 2, 3], 4), 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [7], 0.0)
    assert scheduler.num_steps_ahead() == 0


@pytest.mark.parametrize("num_steps", [0, -1, 1.0, None])
def test_a_leap_of_no_steps_is_refused(scheduler: Scheduler, num_steps: object) -> None:
    with pytest.raises(InvalidArgumentError, match="num_steps"):
        scheduler.leap(num_steps, 1.0)
    assert scheduler.num_steps_ahead() == 3


def test_a_simulated_request_has_no_tokens_to_show(scheduler: Scheduler) -> None:
    with pytest.raises(InvalidArgumentError, match="request 'a' is simulated"):
        scheduler.outputs("a")
