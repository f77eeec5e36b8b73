"""The service holds under faults, the same way each time; a failure names the command that repeats it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pagedkv import CacheConfig, ConfigError, InvariantViolation, KVCacheManager
from pagedkv.scheduler import EventSink, Scheduler, SchedulerConfig
from pagedkv.testing.scheduler_zoo import WaitsForRoom
from pagedkv.testing.soak import (
    ALLOCATION_POINTS,
    Fault,
    FaultKind,
    ScriptedFaults,
    Service,
    SoakConfig,
    SoakFailedError,
    World,
    build_scheduler,
    draw_service,
    run_soak,
)


def run(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagedkv", "soak", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_quarter_of_an_hour_passes(seed: int) -> None:
    report = run_soak(SoakConfig(0.25, seed))

    assert report.num_finished_samples > 50
    assert report.max_preemptions <= 8


SERVICE = Service(SchedulerConfig(24, 6, watermark=0), CacheConfig(20, 4, 12), "lru", False, "swap", 0.5, True)


@pytest.mark.parametrize("point", ALLOCATION_POINTS)
def test_an_allocation_point_that_fails_all_the_time_is_survived(point: str) -> None:
    rng = np.random.default_rng(5)
    num_points, index = len(ALLOCATION_POINTS), ALLOCATION_POINTS.index(point)
    faults = [
        Fault(step, FaultKind.ALLOCATION, num_points * (1 + step % 3) + index) for step in range(1500) if step % 4
    ]
    world = World(SERVICE, rng, ScriptedFaults(faults))

    for _ in range(1500):
        world.step()
    world.drain()

    assert world.allocations.num_failures[point] >= 5
    assert sum(world.allocations.num_failures.values()) == world.allocations.num_failures[point]


@pytest.mark.slow
def test_an_hour_takes_less_than_thirty_seconds_and_a_day_leaves_no_memory_behind() -> None:
    report = run_soak(SoakConfig(24, 1))

    assert report.rss_growth_bytes is None or report.rss_growth_bytes < 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_half_an_hour_of_many_services_passes(seed: int) -> None:
    run_soak(SoakConfig(0.5, seed, service_hours=0.25))


def test_the_command_gives_the_same_logs_whatever_strings_hash_to() -> None:
    first, second = (run("--hours", "0.05", "--seed", "4", "--json", hash_seed=seed) for seed in ("0", "1"))

    assert first.returncode == second.returncode == 0
    outcomes = [json.loads(result.stdout) for result in (first, second)]
    for outcome in outcomes:
        del outcome["wall_s"], outcome["rss_growth_bytes"]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["passed"] is True
    assert len(outcomes[0]["digest"]) == 64


def test_the_command_tells_figures_and_refuses_no_time_at_all() -> None:
    told = run("--hours", "0.05", "--seed", "1")
    refused = run("--hours", "0")

    assert told.returncode == 0
    assert "all as without a cache" in told.stdout
    assert refused.returncode == 2
    assert refused.stderr == "error: hours must be a number above 0, at most 10000, found 0.0\n"


def forgetful(service: Service, sink: EventSink) -> Scheduler:
    """A scheduler that forgets to let go of what an aborted request holds."""
    scheduler = build_scheduler(service, sink)
    release = scheduler._leave

    def leave(sample: object) -> None:
        scheduler._memory.pool.acquire(scheduler._memory.sequences.blocks(sample.row)[:1])
        release(sample)

    scheduler._leave = leave
    return scheduler


def test_a_failure_names_the_invariant_and_the_command_that_repeats_it() -> None:
    config = SoakConfig(0.5, 7, service_hours=0.25)
    messages = []
    for _ in range(2):
        with pytest.raises(SoakFailedError) as caught:
            run_soak(config, factory=forgetful)
        messages.append(str(caught.value))

    assert messages[0] == messages[1]
    assert caught.value.invariant == "I1"
    assert caught.value.command == "pagedkv soak --hours 0.0119 --seed 7 --service-hours 0.25"
    assert messages[0].endswith(caught.value.command)


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e9, "1"])
def test_hours_are_a_number(hours: object) -> None:
    with pytest.raises(ConfigError):
        SoakConfig(hours)


@pytest.mark.parametrize("kind", FaultKind)
def test_each_fault_alone_is_survived(kind: FaultKind) -> None:
    rng = np.random.default_rng(11)
    faults = ScriptedFaults(Fault(step, kind, 1 + step % 4) for step in range(3, 400, 7))
    world = World(draw_service(rng), rng, faults)

    for _ in range(400):
        world.step()
    world.drain()

    assert world.fault_counts[kind] == 57
    assert sum(world.fault_counts.values()) == 57


def test_whoever_never_gets_through_is_found_when_the_faults_stop() -> None:
    def wait_for_room(service: Service, sink: EventSink) -> Scheduler:
        return WaitsForRoom(service.scheduler, KVCacheManager(service.cache), sink=sink)

    world = World(SERVICE, np.random.default_rng(2), factory=wait_for_room)
    for _ in range(200):
        world.step()

    with pytest.raises(InvariantViolation, match=r"I11: [0-9]+ samples wait and nothing runs"):
        world.drain()
