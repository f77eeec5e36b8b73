"""Every guard of the scheduler's recount is tripped once: a check that cannot fail looks like health."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagedkv import CacheConfig, InvariantViolation, KVCacheManager
from pagedkv.scheduler import LatestArrival, Request, Scheduler, SchedulerConfig, Swap
from pagedkv.scheduler.sample import Sample, SampleState


@pytest.fixture
def scheduler() -> Scheduler:
    """Requests: "run" and "more" have seats, "out" was swapped out, "wait" has no seat yet."""
    manager = KVCacheManager(CacheConfig(num_blocks=6, block_size=2, num_host_blocks=6))
    scheduler = Scheduler(SchedulerConfig(32, 3, watermark=0), manager, victim=LatestArrival(), preemption=Swap())
    for name in ("run", "more", "out", "wait"):
        scheduler.add(Request(name, [ord(name[0])] * 4, 8), 0.0)
    while not any(sample.state is SampleState.SWAPPED for sample in samples(scheduler)):
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, [7] * len(plan.sampling_rows), 0.0)
    return scheduler


def samples(scheduler: Scheduler) -> list[Sample]:
    return [sample for group in scheduler._live.values() for sample in group]


def sample(scheduler: Scheduler, name: str) -> Sample:
    return scheduler._live[name][0]


def test_a_healthy_scheduler_passes(scheduler: Scheduler) -> None:
    states = {one.request.request_id: one.state.value for one in samples(scheduler)}

    assert states == {"run": "running", "more": "running", "out": "swapped", "wait": "waiting"}
    scheduler.check_invariants()


def swap_owners(scheduler: Scheduler) -> None:
    first, second = sample(scheduler, "run"), sample(scheduler, "more")
    owners = scheduler._running.samples
    owners[first.row], owners[second.row] = second, first


CORRUPTIONS: dict[str, tuple[str, Callable[[Scheduler], object]]] = {
    "a sample runs without a row of its own": (
        "I15",
        lambda s: setattr(sample(s, "wait"), "state", SampleState.RUNNING),
    ),
    "a row runs for another sample": ("I15", swap_owners),
    "a seat is taken twice": ("I15", lambda s: setattr(s._running, "num_seats", 3)),
    "more seats are taken than there are": (
        "I15",
        lambda s: (setattr(sample(s, "run"), "num_samples", 9), setattr(s._running, "num_seats", 10)),
    ),
    "a waiting sample was lost from the queue": ("I10", lambda s: s._queue.remove(sample(s, "wait"))),
    "a finished sample is still in the queue": (
        "I10",
        lambda s: setattr(sample(s, "wait"), "state", SampleState.FINISHED),
    ),
    "a swapped sample has no host blocks": (
        "I6",
        lambda s: setattr(sample(s, "out"), "row", sample(s, "run").row),
    ),
    "a sample is longer than it may be": ("I15", lambda s: setattr(sample(s, "run"), "max_tokens", 4)),
}


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_the_recount_finds(scheduler: Scheduler, invariant: str, corrupt: Callable[[Scheduler], object]) -> None:
    corrupt(scheduler)

    with pytest.raises(InvariantViolation) as caught:
        scheduler.check_invariants()

    assert caught.value.invariant == invariant
