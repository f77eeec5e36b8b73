"""Whatever is raised while a step is planned, the scheduler stays consistent, plans again, and every answer is right."""

from __future__ import annotations

import io

import numpy as np
import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import EventLog, EventSink, Request, Scheduler, SchedulerConfig, Swap, VictimPolicy
from pagedkv.scheduler.events import Event
from pagedkv.testing.event_log import check_event_log
from pagedkv.testing.scheduler_shadow import ShadowEngine, answers_to
from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS, AllocationFaults, InjectedFailureError


class Service:
    """Six requests, forks among them, on too few blocks; drafts that are right half of the time."""

    def __init__(
        self, *, num_host_blocks: int, victim: VictimPolicy | None = None, sink: EventSink | None = None
    ) -> None:
        manager = KVCacheManager(CacheConfig(12, 2, num_host_blocks))
        self.log = io.StringIO()
        self.scheduler = Scheduler(
            SchedulerConfig(14, 5, watermark=0),
            manager,
            preemption=Swap(),
            victim=victim,
            sink=EventLog(self.log) if sink is None else sink,
        )
        self.engine = ShadowEngine(self.scheduler)
        self.faults = AllocationFaults(manager.memory)
        self.answers = {}
        for i, (num_prompt, num_new, n) in enumerate(
            [(5, 6, 1), (4, 7, 3), (5, 6, 1), (9, 3, 1), (2, 5, 2), (1, 6, 1)]
        ):
            request = Request(f"r{i}", [1, 2, 3, 4, *range(50 * i, 50 * i + 5)][:num_prompt], num_new, n=n)
            self.scheduler.add(request, 0.0)
            self.answers[request.request_id] = answers_to(request)

    def guesses(self) -> dict[int, list[int]]:
        drafts = {}
        for row in self.scheduler.running_rows.tolist():
            if row in self.engine.seats:
                request_id, idx = self.engine.seats[row]
                answer = self.answers[request_id][idx]
                drafts[row] = answer.token_ids[answer.num_given :][:2]
                if row % 2:
                    drafts[row] = [token + 1 for token in drafts[row]]
        return drafts

    def step(self) -> None:
        plan = self.scheduler.schedule(0.0, self.guesses())
        self.engine.take_seats(plan)
        self.engine.move_blocks(plan)
        outcome = self.engine.compute(plan)
        for output in self.scheduler.update(plan, outcome, 0.0).outputs:
            answer = self.answers[output.request_id][output.sample_idx]
            assert output.token_id == answer.token_ids[answer.num_given]
            answer.num_given += 1

    def run(self) -> int:
        """Step until everybody is through, trying again what fails; returns the number of failures."""
        num_failures = 0
        for _ in range(400):
            if not self.scheduler.has_work:
                break
            try:
                self.step()
            except (InjectedFailureError, RuntimeError):
                num_failures += 1
                assert self.scheduler.in_flight is None
                self.scheduler.check_invariants()
        assert all(answer.is_given for answers in self.answers.values() for answer in answers)
        statistics = self.scheduler.manager.statistics()
        assert (statistics.num_used, statistics.num_host_used, statistics.num_sequences) == (0, 0, 0)
        return num_failures


@pytest.mark.parametrize("point", ALLOCATION_POINTS)
@pytest.mark.parametrize("num_host_blocks", [1, 12])
def test_the_nth_allocation_fails_for_every_n(point: str, num_host_blocks: int) -> None:
    reached = Service(num_host_blocks=num_host_blocks)
    reached.run()
    num_visits = reached.faults.num_reached[point]
    assert num_visits >= 1

    for nth in range(1, num_visits + 1):
        service = Service(num_host_blocks=num_host_blocks)
        service.faults.arm(point, nth)
        num_failures = service.run()
        assert num_failures == (0 if point == "names" else 1)
        lines = service.log.getvalue().splitlines()
        check_event_log(lines, max_num_running=5, num_blocks=12, max_tokens_per_step=3, is_complete=True)


class RaisingVictim:
    """A policy with a bug: every second choice raises."""

    num_choices = 0

    def choose(self, ranks: np.ndarray, serials: np.ndarray) -> int:
        self.num_choices += 1
        if self.num_choices % 2:
            raise RuntimeError("a bug in a policy")
        return int(serials.argmax())


def test_a_policy_that_raises_costs_a_step_and_nothing_else() -> None:
    service = Service(num_host_blocks=12, victim=RaisingVictim())

    assert service.run() > 0
    assert "planning raised RuntimeError" in service.log.getvalue()


class StubbornSink:
    """Raises at one event of each kind, after having noted it; at aborts, it aborts another request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.raised: set[str] = set()
        self.scheduler: Scheduler | None = None

    def emit(self, event: Event) -> None:
        self.events.append(event)
        kind = type(event).__name__
        if kind == "Aborted" and kind not in self.raised:
            self.raised.add(kind)
            self.scheduler.abort("b", 0.0)
        if kind in ("Added", "Admitted") and kind not in self.raised:
            self.raised.add(kind)
            raise RuntimeError("a bug in a sink")


def test_events_behind_one_at_which_the_sink_raised_are_told_by_the_next_call() -> None:
    sink = StubbornSink()
    scheduler = Scheduler(SchedulerConfig(8, 4), KVCacheManager(CacheConfig(8, 2)), sink=sink)
    with pytest.raises(RuntimeError):
        scheduler.add(Request("a", [1], 2), 0.0)
    scheduler.add(Request("b", [2], 2), 0.0)
    with pytest.raises(RuntimeError):
        scheduler.schedule(0.0)
    assert [type(event).__name__ for event in sink.events] == ["Added", "Added", "Admitted"]

    scheduler.update(scheduler.in_flight, [7, 7], 0.0)

    assert [(type(event).__name__, event.request_id) for event in sink.events[2:]] == [
        ("Admitted", "a"),
        ("Admitted", "b"),
    ]


def test_what_a_sink_brings_about_is_told_after_what_happened_before() -> None:
    sink = StubbornSink()
    sink.raised = {"Added", "Admitted"}
    sink.scheduler = scheduler = Scheduler(SchedulerConfig(8, 4), KVCacheManager(CacheConfig(8, 2)), sink=sink)
    for request_id in ("a", "b"):
        scheduler.add(Request(request_id, [1, 2], 2, n=2), 0.0)
    scheduler.update(scheduler.schedule(0.0), [7, 7, 7, 7], 0.0)
    sink.events.clear()

    scheduler.abort("a", 0.0)

    assert [event.request_id for event in sink.events] == ["a", "a", "b", "b"]
    assert not scheduler.has_work


def test_blocks_that_somebody_else_let_go_of_are_noticed_when_nothing_runs() -> None:
    manager = KVCacheManager(CacheConfig(4, 2))
    manager.open("other", [1, 2, 3, 4, 5, 6])
    manager.append("other", 6)
    scheduler = Scheduler(SchedulerConfig(8, 2), manager)
    scheduler.add(Request("a", [9, 9, 9], 1), 0.0)
    assert len(scheduler.schedule(0.0).rows) == 0
    scheduler.update(scheduler.in_flight, [], 0.0)

    manager.close("other")

    assert len(scheduler.schedule(1.0).rows) == 1
