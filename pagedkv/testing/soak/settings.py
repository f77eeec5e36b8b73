"""What a soak run is: how long, under which faults, and what service is put through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np

from pagedkv.arrays import as_int
from pagedkv.config import CacheConfig
from pagedkv.errors import ConfigError
from pagedkv.eviction import POLICY_NAMES
from pagedkv.scheduler import SchedulerConfig

__all__ = ["Fault", "FaultKind", "Service", "SERVICE_HOURS", "SoakConfig", "draw_service"]

MAX_HOURS = 10_000.0
SERVICE_HOURS = 4.0
T = TypeVar("T")


class FaultKind(StrEnum):
    """What may go wrong in a step; `Fault.detail` says how."""

    ALLOCATION = "allocation"
    """The n-th visit to one of the allocation points fails: detail = n * (number of points) + point."""
    DEVICE_FULL = "device full"
    """Somebody else takes all device blocks that are available, for `detail` steps."""
    HOST_FULL = "host full"
    """Somebody else takes the host pool, for `detail` steps."""
    COPY_PARTIAL = "copy partial"
    """In the next step that copies blocks, the copies stop after `detail` of them, and the step fails."""
    COPY_LATE = "copy late"
    """The step takes `detail` seconds longer; requests come and go meanwhile."""
    COPY_TWICE = "copy twice"
    """Copies are made twice, and the step is reported twice."""
    COPY_NEVER = "copy never"
    """Nothing is heard of the step again; a watchdog reports it as failed."""
    ABORT = "abort"
    """A client gives up on a request, in whatever state it is; odd details: while the step is in flight."""
    DUPLICATE_ID = "duplicate id"
    """A request comes with the id of a live one."""
    UNKNOWN_ID = "unknown id"
    """An abort comes for a request that never was, or is gone."""
    CLOCK_JUMP = "clock jump"
    """The clock that the scheduler is told jumps by `detail` seconds, backwards too."""
    BAD_CALL = "bad call"
    """A wrong number of tokens, a plan that is not in flight, a time that is no number."""
    SINK_RAISES = "sink raises"
    """The event sink raises at the `detail`-th event from now."""
    SINK_CALLS_BACK = "sink calls back"
    """The event sink aborts a request at the `detail`-th event from now."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong in one step."""

    step: int
    kind: FaultKind
    detail: int = 1


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """How long to serve, in simulated hours, and from which seed everything is drawn.

    Faults are on most of the time; every ten minutes they stop, and whoever is there must get through. The service is set
    up anew, with another configuration, every `service_hours`.
    """

    hours: float
    seed: int = 0
    service_hours: float = SERVICE_HOURS

    def __post_init__(self) -> None:
        for name in ("hours", "service_hours"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= MAX_HOURS or not math.isfinite(value):
                raise ConfigError(f"{name} must be a number above 0, at most {MAX_HOURS:g}, found {value!r}")
        as_int("seed", self.seed, at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True, slots=True)
class Service:
    """One configuration of everything that has a choice.

    `accuracy` is the share of draft tokens that come true, None: nothing is guessed. `narrow_hash` gives block keys a
    hash of four bits, so that names collide in the map all the time.
    """

    scheduler: SchedulerConfig
    cache: CacheConfig
    eviction: str
    by_priority: bool
    preemption: str
    accuracy: float | None
    narrow_hash: bool


def draw_service(rng: np.random.Generator) -> Service:
    """Draw a configuration. Pools are small, so that shortage, eviction and preemption are common."""

    def choose(*options: T) -> T:
        return options[int(rng.integers(len(options)))]

    block_size = choose(2, 4, 8)
    chunked = choose(True, True, True, False)
    budget = choose(24, 48, 96)
    num_host_slots = choose(0, 64, 256)
    return Service(
        scheduler=SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_running=choose(4, 8),
            long_prefill_tokens=choose(None, 8) if chunked else None,
            chunked_prefill=chunked,
            watermark=choose(0.0, 0.01, 0.1),
            max_bypasses=choose(0, 1, 4),
            max_preemptions=choose(1, 2, 8),
            client_share=choose(None, None, 0.5),
            admission_interval=choose(1, 1, 1, 3, 12),
        ),
        cache=CacheConfig(
            num_blocks=int(rng.integers(90, 220)) // block_size,
            block_size=block_size,
            num_host_blocks=num_host_slots // block_size,
            prefix_caching=choose(True, True, True, False),
        ),
        eviction=choose(*POLICY_NAMES),
        by_priority=choose(False, True),
        preemption=choose("recompute", "swap", "swap", "cheaper"),
        accuracy=choose(None, None, 0.5, 0.9),
        narrow_hash=choose(False, True),
    )
