"""The scheduler that a soak run puts through it, built as a service says, and the event sink that misbehaves."""

from __future__ import annotations

from collections.abc import Callable

from pagedkv.eviction import make_policy
from pagedkv.manager import KVCacheManager
from pagedkv.scheduler import (
    FCFS,
    Cheaper,
    Event,
    EventSink,
    LatestArrival,
    LowestPriority,
    PreemptionPolicy,
    Priority,
    Recompute,
    Scheduler,
    Swap,
)
from pagedkv.testing.soak.narrow_hash import NarrowHashManager
from pagedkv.testing.soak.settings import Service

__all__ = ["SchedulerFactory", "SinkRaisedError", "WorldSink", "build_scheduler"]

PREEMPTION: dict[str, PreemptionPolicy] = {"recompute": Recompute(), "swap": Swap(), "cheaper": Cheaper(1.0, 3.0)}


class SinkRaisedError(RuntimeError):
    """What an event sink raised, on purpose."""


class WorldSink:
    """Passes events on to the log that is checked; then raises, or calls back, when it is told to."""

    def __init__(self, log: EventSink) -> None:
        self._log = log
        self.raises_in = 0
        self.calls_back_in = 0
        self.call_back: Callable[[], None] = lambda: None
        self.is_calling_back = False

    def emit(self, event: Event) -> None:
        """Take one event."""
        self._log.emit(event)
        self.raises_in -= 1
        self.calls_back_in -= 1
        if self.calls_back_in == 0:
            self.is_calling_back = True
            self.call_back()
            self.is_calling_back = False
        if self.raises_in == 0:
            raise SinkRaisedError("the sink raises, on purpose")


def build_scheduler(service: Service, sink: WorldSink) -> Scheduler:
    """The scheduler of pagedkv itself, configured as the service says."""
    manager_class = NarrowHashManager if service.narrow_hash else KVCacheManager
    eviction = make_policy(service.eviction, service.cache.num_blocks)
    return Scheduler(
        service.scheduler,
        manager_class(service.cache, eviction=eviction),
        policy=Priority() if service.by_priority else FCFS(),
        victim=LowestPriority() if service.by_priority else LatestArrival(),
        preemption=PREEMPTION[service.preemption if service.cache.num_host_blocks else "recompute"],
        sink=sink,
    )


SchedulerFactory = Callable[[Service, WorldSink], Scheduler]
"""Builds another scheduler for the same service."""
