"""An abort in every state at every step of ten scripted scenarios: everybody else gets the right answer, and nothing stays."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import EventLog, PreemptionPolicy, Recompute, Request, Scheduler, SchedulerConfig, StepPlan, Swap
from pagedkv.testing.event_log import check_event_log
from pagedkv.testing.scheduler_shadow import Answer, ShadowEngine, answers_to

# Scenario: limits, pools, how victims are kept, and (prompt, new tokens, samples) of each request, all there from the start.
SCENARIOS: dict[str, tuple[SchedulerConfig, CacheConfig, PreemptionPolicy, list[tuple[int, int, int]]]] = {
    "one alone": (SchedulerConfig(8, 2), CacheConfig(8, 2), Recompute(), [(5, 4, 1)]),
    "chunks": (SchedulerConfig(4, 2), CacheConfig(12, 2), Recompute(), [(11, 3, 1), (6, 3, 1)]),
    "whole prompts": (SchedulerConfig(16, 2, chunked_prefill=False), CacheConfig(9, 2), Recompute(), [(9, 3, 1), (8, 4, 1)]),
    "waiting for a seat": (SchedulerConfig(8, 1), CacheConfig(12, 2), Recompute(), [(3, 3, 1), (4, 2, 1), (2, 2, 1)]),
    "preempted": (SchedulerConfig(16, 4, watermark=0), CacheConfig(7, 2), Recompute(), [(4, 7, 1), (4, 7, 1), (2, 6, 1)]),
    "swapped": (SchedulerConfig(16, 4, watermark=0), CacheConfig(7, 2, 7), Swap(), [(4, 7, 1), (4, 7, 1), (2, 6, 1)]),
    "swapped without names": (
        SchedulerConfig(16, 4, watermark=0), CacheConfig(7, 2, 7, False), Swap(), [(4, 7, 1), (4, 7, 1), (2, 6, 1)]
    ),
    "forked": (SchedulerConfig(8, 4), CacheConfig(16, 2), Recompute(), [(3, 4, 3), (2, 3, 1)]),
    "forked and preempted": (SchedulerConfig(16, 4, watermark=0), CacheConfig(7, 2, 4), Swap(), [(3, 6, 2), (3, 6, 2)]),
    "prompts only": (SchedulerConfig(4, 2), CacheConfig(8, 2), Recompute(), [(7, 0, 1), (6, 2, 1), (3, 0, 1)]),
}  # fmt: skip

MOMENTS = ("before the step", "in flight", "after a failed step")


class Run:
    """One scenario, in which one request is aborted at one moment of one step."""

    def __init__(self, name: str) -> None:
        config, cache, preemption, sizes = SCENARIOS[name]
        self.log = io.StringIO()
        self.config, self.cache = config, cache
        self.scheduler = Scheduler(config, KVCacheManager(cache), preemption=preemption, sink=EventLog(self.log))
        self.engine = ShadowEngine(self.scheduler)
        self.answers: dict[str, list[Answer]] = {}
        self.states: set[str] = set()
        for i, (num_prompt, num_new, n) in enumerate(sizes):
            request = Request(f"r{i}", [7 * i + j for j in range(num_prompt)], num_new, n=n)
            self.scheduler.add(request, 0.0)
            self.answers[request.request_id] = answers_to(request)

    def go(self, abort_at: int, moment: str, request_id: str) -> int:
        """Run to the end; returns how many steps that took."""
        for step in range(300):
            if not self.scheduler.has_work:
                return step
            if step == abort_at and moment == "before the step":
                self.abort(request_id)
            plan = self.scheduler.schedule(float(step))
            self.engine.take_seats(plan)
            if step == abort_at and moment != "before the step":
                if moment == "after a failed step":
                    self.engine.spoil(plan)
                    self.scheduler.fail(plan, float(step))
                    self.abort(request_id)
                    continue
                self.abort(request_id)
            self.finish(plan, float(step))
        raise AssertionError("not everybody got through")

    def abort(self, request_id: str) -> None:
        """Abort it, if it is still live, and note the states in which its samples were."""
        for sample in self.scheduler._live.get(request_id, []):
            self.states.add(sample.state.value)
        if request_id in self.scheduler._live:
            self.scheduler.abort(request_id, 0.0)
            self.answers.pop(request_id)
            self.scheduler.check_invariants()

    def finish(self, plan: StepPlan, now: float) -> None:
        self.engine.move_blocks(plan)
        tokens = self.engine.compute(plan)
        assert isinstance(tokens, list)
        for row, token in zip(plan.sampling_rows.tolist(), tokens, strict=True):
            request_id, sample_idx = self.engine.seats[row]
            if request_id in self.answers:
                answer = self.answers[request_id][sample_idx]
                assert token == answer.token_ids[answer.num_given]
                answer.num_given += 1
        self.scheduler.update(plan, tokens, now)

    def check_end(self) -> None:
        statistics = self.scheduler.manager.statistics()
        assert (statistics.num_used, statistics.num_host_used, statistics.num_sequences) == (0, 0, 0)
        assert all(answer.is_given for answers in self.answers.values() for answer in answers)
        self.scheduler.check_invariants()
        check_event_log(
            self.log.getvalue().splitlines(),
            max_num_running=self.config.max_num_running,
            num_blocks=self.cache.num_blocks,
            is_complete=True,
        )


def sweep(name: str, moment: str, after: Callable[[Run], None] = lambda run: None) -> int:
    """Abort each request at this moment of every step that there is; returns the number of runs."""
    num_steps = Run(name).go(-1, moment, "")
    num_runs = 0
    for i in range(len(SCENARIOS[name][3])):
        for step in range(num_steps):
            run = Run(name)
            run.go(step, moment, f"r{i}")
            run.check_end()
            after(run)
            num_runs += 1
    return num_runs


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_abort_at_every_step_leaves_nothing_and_disturbs_nobody(name: str, moment: str) -> None:
    assert sweep(name, moment) >= 4


def test_every_state_is_met() -> None:
    states: set[str] = set()
    for name in ("preempted", "swapped", "forked"):
        sweep(name, "before the step", lambda run: states.update(run.states))

    assert states == {"waiting", "running", "swapped"}
