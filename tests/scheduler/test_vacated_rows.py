"""`plan.vacated` and `plan.admitted` alone tell an engine whose row is whose, whatever took the seats."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import Recompute, Request, Scheduler, SchedulerConfig, Swap


def make_scheduler(num_blocks: int = 16, **options: object) -> Scheduler:
    manager = KVCacheManager(CacheConfig(num_blocks, 2, num_host_blocks=num_blocks))
    return Scheduler(SchedulerConfig(64, 4, watermark=0), manager, **options)


def test_the_row_of_a_sample_that_ended_is_vacated_in_the_next_plan_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2], 1), 0.0)
    scheduler.add(Request("b", [3, 4], 9), 0.0)
    first = scheduler.schedule(0.0)
    scheduler.update(first, [5, 6], 0.0)
    second = scheduler.schedule(1.0)
    scheduler.update(second, [7], 1.0)
    third = scheduler.schedule(2.0)

    assert [plan.vacated.tolist() for plan in (first, second, third)] == [[], [0], []]
    assert second.vacated.dtype == np.int64


def test_a_row_may_be_vacated_and_taken_in_one_plan() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2], 1), 0.0)
    scheduler.update(scheduler.schedule(0.0), [5], 0.0)
    scheduler.add(Request("b", [3, 4], 2), 0.0)
    plan = scheduler.schedule(1.0)

    assert plan.vacated.tolist() == [0]
    assert [(seat.row, seat.request_id) for seat in plan.admitted] == [(0, "b")]


def test_an_abort_vacates_a_row_also_while_its_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2], 9), 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.abort("a", 0.0)
    scheduler.update(plan, [5], 0.0)

    assert scheduler.schedule(1.0).vacated.tolist() == [0]


@pytest.mark.parametrize("preemption", [Recompute(), Swap()])
def test_a_preempted_sample_vacates_its_row_in_the_plan_that_preempts_it(preemption) -> None:
    scheduler = make_scheduler(num_blocks=4, preemption=preemption)
    scheduler.add(Request("a", [1, 2], 6), 0.0)
    scheduler.add(Request("b", [3, 4], 6), 0.0)
    vacated = []
    while not scheduler.num_waiting or not vacated:
        plan = scheduler.schedule(0.0)
        vacated.append(plan.vacated.tolist())
        scheduler.update(plan, [5] * len(plan.sampling_rows), 0.0)

    assert vacated == [[], [], [], [1]]


def test_a_step_that_could_not_be_planned_leaves_what_it_vacated_to_the_next(monkeypatch) -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2], 1), 0.0)
    scheduler.update(scheduler.schedule(0.0), [5], 0.0)
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr(type(scheduler._sampling), "choose", lambda *_: (_ for _ in ()).throw(MemoryError))
        scheduler.add(Request("b", [3, 4], 2), 0.0)
        with pytest.raises(MemoryError):
            scheduler.schedule(1.0)
    plan = scheduler.schedule(2.0)

    assert plan.vacated.tolist() == [0]
    assert [seat.row for seat in plan.admitted] == [0]


@pytest.mark.parametrize("seed", range(60))
def test_an_engine_that_follows_plans_knows_who_runs_in_which_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scheduler = make_scheduler(num_blocks=10, preemption=Swap() if seed % 2 else Recompute())
    rows: dict[int, tuple[str, int]] = {}
    for turn in range(80):
        now = float(turn)
        if rng.random() < 0.4:
            prompt = SimulatedPrompt(int(rng.integers(1, 7)))
            scheduler.add(Request(str(turn), prompt, int(rng.integers(0, 9)), n=int(rng.integers(1, 4))), now)
        if rng.random() < 0.2:
            abort_any(scheduler, rng, now)
        plan = scheduler.schedule(now)
        for row in plan.vacated.tolist():
            del rows[row]
        for seat in plan.admitted:
            assert rows.get(seat.row, seat[1:]) == seat[1:]
            rows[seat.row] = seat[1:]
        samples = scheduler._running.samples
        assert rows == {
            row: (samples[row].request.request_id, samples[row].sample_idx) for row in scheduler.running_rows.tolist()
        }
        if rng.random() < 0.1:
            abort_any(scheduler, rng, now)
        if rng.random() < 0.2:
            scheduler.fail(plan, now)
        else:
            scheduler.update(plan, None, now)


def abort_any(scheduler: Scheduler, rng: np.random.Generator, now: float) -> None:
    live = list(scheduler._live)
    if live:
        scheduler.abort(live[int(rng.integers(len(live)))], now)
