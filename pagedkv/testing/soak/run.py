"""Serve for simulated hours, service after service; what fails, fails again with one command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil
from pathlib import Path

import numpy as np

from pagedkv.testing.soak.fault_sources import FaultSource, NoFaults, RandomFaults
from pagedkv.testing.soak.run_failed import RunFailedError
from pagedkv.testing.soak.scheduler_build import SchedulerFactory, build_scheduler
from pagedkv.testing.soak.settings import SERVICE_HOURS, SoakConfig, draw_service
from pagedkv.testing.soak.world import World

__all__ = ["SoakFailedError", "SoakReport", "run_soak"]

HOUR_S = 3600.0
# Faults are on for some time, then they and arrivals stop until everybody is through, then there is quiet service.
FAULTY_S = 500.0
QUIET_S = 100.0
WARM_UP_HOURS = 1.0


class SoakFailedError(RunFailedError):
    """Something did not hold. The message says what, when, and which command does it again."""

    def __init__(self, config: SoakConfig, world: World, error: BaseException, *, hours_before: float = 0.0) -> None:
        # The shortest run that gets there: what comes before is drawn from the same seed, and cannot be left out.
        hours = min(config.hours, ceil(1e4 * (hours_before + world.clock_s / HOUR_S)) / 1e4)
        command = f"pagedkv soak --hours {max(hours, 1e-4):.10g} --seed {config.seed}"
        if config.service_hours != SERVICE_HOURS:
            command += f" --service-hours {config.service_hours:g}"
        where = f"simulated second {world.clock_s:.1f} of this service, step {world.num_steps}, {world.service}"
        super().__init__(error, where, command)


@dataclass(slots=True)
class SoakReport:
    """What came of a run. Everything but `rss_growth_bytes` follows from the configuration.

    `digest` is that of all event logs. `rss_growth_bytes` is by how much resident memory grew after the first simulated
    hour, None where this system does not tell.
    """

    config: SoakConfig
    num_services: int = 0
    num_steps: int = 0
    num_requests: int = 0
    num_refused: int = 0
    num_turned_away: int = 0
    num_aborted: int = 0
    num_finished_samples: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    num_failed_steps: int = 0
    max_preemptions: int = 0
    max_drain_steps: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    failed_allocations: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    rss_growth_bytes: int | None = None

    def add(self, world: World) -> None:
        """Add what one service has gone through."""
        told = world.log.checker.summary
        self.num_services += 1
        self.num_steps += world.num_steps
        self.num_requests += told.num_added
        self.num_refused += told.num_refused
        self.num_turned_away += world.num_turned_away
        self.num_aborted += told.num_aborted_requests
        self.num_finished_samples += told.num_finished_samples
        self.num_tokens += world.num_tokens
        self.num_preemptions += told.num_preemptions
        self.num_swaps += told.num_swaps
        self.num_failed_steps += told.num_failed_steps
        self.max_preemptions = max(self.max_preemptions, told.max_preemptions)
        for kind, count in world.fault_counts.items():
            self.faults[str(kind)] = self.faults.get(str(kind), 0) + count
        for point, count in world.allocations.num_failures.items():
            self.failed_allocations[point] = self.failed_allocations.get(point, 0) + count
        self.digest = sha256((self.digest + world.log.digest).encode()).hexdigest()


def run_soak(
    config: SoakConfig, *, progress: Callable[[float], None] | None = None, factory: SchedulerFactory = build_scheduler
) -> SoakReport:
    """Serve `config.hours`; `progress` gets the simulated hours so far. Raises SoakFailedError at the first violation.

    `factory` builds another scheduler than pagedkv's own to be put through it.
    """
    report = SoakReport(config)
    rng = np.random.default_rng(config.seed)
    hours_left = config.hours
    rss_before: int | None = None
    while hours_left > 0:
        world = World(draw_service(rng), rng, factory=factory)
        hours = min(hours_left, config.service_hours)
        try:
            while world.clock_s < hours * HOUR_S:
                report.max_drain_steps = max(report.max_drain_steps, _serve(world))
                done = config.hours - hours_left + min(hours, world.clock_s / HOUR_S)
                if rss_before is None and done >= WARM_UP_HOURS:
                    rss_before = _resident_bytes()
                if progress is not None:
                    progress(done)
        except Exception as error:
            raise SoakFailedError(config, world, error, hours_before=config.hours - hours_left) from error
        report.add(world)
        hours_left -= hours
    rss_after = _resident_bytes()
    if rss_before is not None and rss_after is not None:
        report.rss_growth_bytes = rss_after - rss_before
    return report


def _serve(world: World) -> int:
    """Serve with faults, let everybody get through, then serve without faults; returns the steps to get through."""
    num_steps = 0
    stages: tuple[tuple[FaultSource, float], ...] = ((RandomFaults(world.rng), FAULTY_S), (NoFaults(), QUIET_S))
    for faults, length_s in stages:
        world.faults = faults
        until_s = world.clock_s + length_s
        while world.clock_s < until_s:
            world.step()
        num_steps = max(num_steps, world.drain())
    return num_steps


def _resident_bytes() -> int | None:
    """Resident memory of this process, None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * 4096
