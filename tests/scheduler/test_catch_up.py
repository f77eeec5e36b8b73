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
    scheduler.add(request("a", 1, 9), 0.0)
    scheduler.add(request("b", 1, 9), 0.0)

    assert [step(scheduler) for _ in range(2)] == [{"long": 4, "a": 1, "b": 1}, {"long": 6, "a": 1, "b": 1}]
