"""How the running rows share the token budget of a step."""

from __future__ import annotations

from small_scheduler import make_scheduler, request

from pagedkv.scheduler import Scheduler


def step(scheduler: Scheduler) -> dict[str, int]:
    """Tokens that each request computes in the next step."""
    plan = scheduler.schedule(0.0)
    names = [scheduler._running.samples[row].request.request_id for row in plan.rows]
    scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)
    return dict(zip(names, plan.num_tokens.tolist(), strict=True))


def test_a_long_prompt_that_was_admitted_first_leaves_a_token_to_each_row_that_decodes() -> None:
    scheduler = make_scheduler(num_blocks=64, budget=8, config={"long_prefill_tokens": 4})
    scheduler.add(request("long", 30, 1), 0.0)
    scheduler.add(request("a", 2, 9), 0.0)
    scheduler.add(request("b", 2, 9), 0.0)

    assert [step(scheduler) for _ in range(2)] == [{"long": 4, "a": 2, "b": 2}, {"long": 6, "a": 1, "b": 1}]


def test_a_long_prompt_takes_the_whole_budget_while_those_that_wait_get_no_seat() -> None:
    scheduler = make_scheduler(num_blocks=64, budget=16, seats=2, config={"long_prefill_tokens": 4})
    scheduler.add(request("decodes", 1, 9), 0.0)
    scheduler.add(request("long", 60, 1), 0.0)
    for name in ("w", "x"):
        scheduler.add(request(name, 2, 1), 0.0)

    assert [step(scheduler) for _ in range(3)] == [{"decodes": 1, "long": 15}] * 3
    scheduler.check_invariants()


def test_a_long_prompt_takes_the_whole_budget_while_those_that_wait_get_no_blocks() -> None:
    scheduler = make_scheduler(num_blocks=16, budget=16, config={"long_prefill_tokens": 4})
    scheduler.add(request("long", 50, 4), 0.0)
    scheduler.add(request("waits", 30, 1), 0.0)

    assert [step(scheduler) for _ in range(5)] == [{"long": 16}, {"long": 16}, {"long": 16}, {"long": 2}, {"long": 1}]


def test_of_two_long_prompts_none_takes_more_than_the_cap_whatever_is_left() -> None:
    scheduler = make_scheduler(num_blocks=64, budget=16, config={"long_prefill_tokens": 4})
    for name in ("a", "b"):
        scheduler.add(request(name, 9, 1), 0.0)

    assert [step(scheduler) for _ in range(3)] == [{"a": 4, "b": 4}, {"a": 4, "b": 4}, {"a": 1, "b": 1}]


def test_what_a_lone_prompt_got_beyond_the_cap_is_taken_back_if_the_step_fails() -> None:
    scheduler = make_scheduler(num_blocks=16, budget=16, seats=1, config={"long_prefill_tokens": 4})
    for name in ("long", "waits"):
        scheduler.add(request(name, 30, 2), 0.0)
    plan = scheduler.schedule(0.0)
    assert (plan.num_tokens.tolist(), len(plan.token_ids), len(plan.slot_mapping)) == ([16], 16, 16)

    scheduler.fail(plan, 0.0)

    scheduler.check_invariants()
    assert scheduler.manager.memory.pool.num_used == 0
    assert [step(scheduler) for _ in range(3)] == [{"long": 16}, {"long": 14}, {"long": 1}]
