"""Under overload everybody gets through, and nobody is thrown out again and again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import (
    Event,
    LowestPriority,
    Priority,
    Recompute,
    Request,
    Scheduler,
    SchedulerConfig,
    Swap,
    steps_to_serve,
)
from pagedkv.scheduler.events import Added, Admitted, Finished, Preempted


def overload(
    seed: int, *, num_requests: int, num_blocks: int, watermark: float = 0.0, max_preemptions: int = 8, **policies
):
    """Run a burst of requests on a pool that holds a few of them; returns the steps, preemptions of each, stated steps."""
    rng = np.random.default_rng(seed)
    manager = KVCacheManager(CacheConfig(num_blocks, 4, num_blocks if rng.random() < 0.5 else 1))
    config = SchedulerConfig(64, 16, watermark=watermark, max_preemptions=max_preemptions)
    scheduler = Scheduler(config, manager, **policies)
    num_stated = 0
    for i in range(num_requests):
        prompt, new = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        num_stated += steps_to_serve(prompt, new, 1, config)
        scheduler.add(Request(f"r{i}", SimulatedPrompt(prompt), new, priority=float(rng.integers(3))), float(i))
    preemptions: dict[str, int] = {}
    for num_steps in range(200 * num_requests):
        if not scheduler.has_work:
            return num_steps, preemptions, num_stated
        plan = scheduler.schedule(float(num_requests))
        assert len(plan.rows), "work is there and nothing runs"
        for sample, _ in scheduler.update(plan, None, float(num_requests)).finished:
            preemptions[sample.request.request_id] = sample.num_preemptions
    raise AssertionError("not everybody got through")


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([Recompute(), Swap()]),
    st.booleans(),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_every_request_of_an_overload_finishes_within_what_is_stated(
    seed, watermark, preemption, by_priority, max_preemptions
) -> None:
    order = {"policy": Priority(), "victim": LowestPriority()} if by_priority else {}

    num_steps, preemptions, num_stated = overload(
        seed,
        num_requests=30,
        num_blocks=24,
        watermark=watermark,
        max_preemptions=max_preemptions,
        preemption=preemption,
        **order,
    )

    assert len(preemptions) == 30
    assert max(preemptions.values()) <= max_preemptions
    assert num_steps <= num_stated


@pytest.mark.parametrize(("max_preemptions", "most"), [(1, 1), (2, 2), (8, 4)])
def test_the_bound_on_preemptions_is_reached_and_not_passed(max_preemptions, most) -> None:
    counts = [
        max(overload(seed, num_requests=30, num_blocks=24, max_preemptions=max_preemptions)[1].values())
        for seed in range(12)
    ]

    assert max(counts) == most


def test_a_settled_sample_comes_back_when_all_settled_ones_fit_to_their_ends() -> None:
    config = SchedulerConfig(64, 8, watermark=0, max_preemptions=1)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(10, 4)))
    for name in ("a", "b", "c"):  # Each needs 3 blocks at first and 6 in the end.
        scheduler.add(Request(name, SimulatedPrompt(12), 13), 0.0)
    seats = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        seats += [(plan.step, seat.request_id) for seat in plan.admitted]
        scheduler.update(plan, None, 0.0)

    # c loses its seat in step 1, b in step 9, and c comes back at once. When a ends in step 12, b would fit as it is; but
    # then both are settled, and with 6 blocks each they would not fit in the end.
    assert seats == [(0, "a"), (0, "b"), (0, "c"), (10, "c"), (22, "b")]


@pytest.mark.parametrize("seed", range(3))
def test_a_watermark_makes_preemptions_rarer(seed) -> None:
    _, without, _ = overload(seed, num_requests=60, num_blocks=60, watermark=0.0)
    _, with_one, _ = overload(seed, num_requests=60, num_blocks=60, watermark=0.1)

    assert sum(with_one.values()) < sum(without.values())


def test_a_request_is_passed_at_most_as_often_as_the_bound_says_while_small_ones_keep_coming() -> None:
    scheduler = Scheduler(SchedulerConfig(64, 16, watermark=0, max_bypasses=3), KVCacheManager(CacheConfig(16, 4)))
    scheduler.add(Request("first", SimulatedPrompt(30), 20), 0.0)
    order = []
    for i in range(80):
        if i == 2:
            scheduler.add(Request("large", SimulatedPrompt(40), 2), float(i))
        if i > 2:
            scheduler.add(Request(f"small{i}", SimulatedPrompt(2), 1), float(i))
        plan = scheduler.schedule(float(i))
        order += [seat.request_id for seat in plan.admitted]
        scheduler.update(plan, None, float(i))

    assert order.index("large") == 1 + 3


class Waits:
    """An event sink that holds each wait against what was stated when it began."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.steps_of: dict[str, int] = {}
        self.begun: dict[str, tuple[int, int, set[str]]] = {}
        """By who waits: the step that is planned next, the steps stated, those who passed since."""
        self.running: set[str] = set()
        self.step = 0
        self.shares: list[float] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Added):
            self.steps_of[event.request_id] = steps_to_serve(
                event.num_prompt_tokens, event.max_new_tokens, event.num_samples, self.config
            )
            self.begin(event.request_id)
        elif isinstance(event, Preempted):
            self.running.remove(event.request_id)
            self.begin(event.request_id)
        elif isinstance(event, Admitted):
            for other, (_, _, passers) in self.begun.items():
                if self.is_before(other, event.request_id):
                    passers.add(event.request_id)
            self.end(event.request_id, event.step)
            self.running.add(event.request_id)
        elif isinstance(event, Finished):
            self.running.remove(event.request_id)

    def begin(self, request_id: str) -> None:
        before = {other for other in self.begun if self.is_before(other, request_id)}
        self.begun[request_id] = self.step, sum(self.steps_of[other] for other in self.running | before), set()

    def end(self, request_id: str, step: int) -> None:
        first, stated, passers = self.begun.pop(request_id)
        assert len(passers) <= self.config.max_bypasses
        stated += sum(self.steps_of[other] for other in passers)
        assert step - first <= stated, f"{request_id} waited {step - first} steps, {stated} were stated"
        self.shares.append((step - first) / max(stated, 1))

    @staticmethod
    def is_before(one: str, other: str) -> bool:
        return int(one) < int(other)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([Recompute(), Swap()]),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=25, deadline=None)
def test_no_wait_is_longer_than_what_was_stated_when_it_began_whoever_comes_later(
    seed, watermark, preemption, max_bypasses, max_preemptions
) -> None:
    rng = np.random.default_rng(seed)
    manager = KVCacheManager(CacheConfig(24, 4, 24 if rng.random() < 0.5 else 1))
    config = SchedulerConfig(
        32, 6, watermark=watermark, max_bypasses=max_bypasses, max_preemptions=max_preemptions, long_prefill_tokens=16
    )
    waits = Waits(config)
    scheduler = Scheduler(config, manager, preemption=preemption, sink=waits)

    for number in range(40):
        prompt, new = int(rng.integers(1, 60)), int(rng.integers(1, 30))
        scheduler.add(Request(str(number), SimulatedPrompt(prompt), new), float(waits.step))
        for _ in range(int(rng.integers(0, 8))):
            take_step(scheduler, waits)
    while scheduler.has_work:
        take_step(scheduler, waits)

    assert len(waits.shares) >= 40
    assert not waits.begun


def take_step(scheduler: Scheduler, waits: Waits) -> None:
    plan = scheduler.schedule(float(waits.step))
    waits.step += 1
    scheduler.update(plan, None, float(waits.step))


def test_a_lone_wait_behind_one_that_runs_takes_all_that_was_stated() -> None:
    config = SchedulerConfig(32, 1)
    waits = Waits(config)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(24, 4)), sink=waits)
    scheduler.add(Request("0", SimulatedPrompt(20), 10), 0.0)
    scheduler.add(Request("1", SimulatedPrompt(1), 1), 0.0)
    while scheduler.has_work:
        take_step(scheduler, waits)

    assert waits.shares == [0.0, 1.0]
