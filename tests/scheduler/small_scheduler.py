"""A scheduler on a few blocks, requests by their lengths, and what its events were."""

from __future__ import annotations

from pagedkv import (
    CacheConfig,
    KVCacheManager,
)
from pagedkv.scheduler import (
    Request,
    Scheduler,
    SchedulerConfig,
)


class Events(list):
    """A sink that keeps the events."""

    def emit(self, event) -> None:
        self.append(event)

    def named(self, name: str) -> list:
        return [event for event in self if type(event).__name__ == name]


def make_scheduler(*, num_blocks=8, block_size=4, budget=64, seats=4, host=0, watermark=0.0, config=None, **policies):
    cache = CacheConfig(num_blocks, block_size, host)
    config = SchedulerConfig(budget, seats, watermark=watermark, **(config or {}))
    return Scheduler(config, KVCacheManager(cache), **policies)


def request(name: str, num_prompt: int, num_new: int, **more) -> Request:
    first = sum(name.encode()) * 1000
    return Request(name, [first + i for i in range(num_prompt)], num_new, **more)


def step(scheduler: Scheduler):
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)
    return plan


def finish(scheduler: Scheduler, max_steps: int = 500) -> int:
    for num_steps in range(max_steps):
        if not scheduler.has_work:
            return num_steps
        step(scheduler)
        scheduler.check_invariants()
    raise AssertionError("not done")


def running_ids(scheduler: Scheduler) -> list[str]:
    return [sample.request.request_id for sample in scheduler._running.samples[scheduler._running.rows]]
