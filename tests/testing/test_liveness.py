"""After faults stop, everybody is served within what is stated; who is not is found, shrunk, and named by one command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from pagedkv import InvalidArgumentError, KVCacheManager
from pagedkv.scheduler import EventSink, Scheduler
from pagedkv.scheduler.shortage import Shortage
from pagedkv.testing.liveness import LivenessFailedError, LivenessTrial, draw_overload, run_liveness
from pagedkv.testing.scheduler_zoo import FencesVictims, WaitsForRoom
from pagedkv.testing.soak import FaultKind, Service, build_scheduler


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagedkv", "liveness", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("first_seed", range(0, 1000, 100))
def test_a_hundred_overloads_are_served_once_nothing_fails_any_more(first_seed: int) -> None:
    report = run_liveness(100, first_seed=first_seed)

    assert report.num_served > 800
    assert report.num_preemptions > 30
    assert set(report.faults) == set(FaultKind)
    assert min(report.faults.values()) > 10
    assert report.max_share <= 1


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(1000, 100_000, 1000))
def test_a_thousand_more_are_served(first_seed: int) -> None:
    run_liveness(1000, first_seed=first_seed)


def waits_for_room(service: Service, sink: EventSink) -> Scheduler:
    return WaitsForRoom(service.scheduler, KVCacheManager(service.cache), sink=sink)


def fences_victims(service: Service, sink: EventSink) -> Scheduler:
    return FencesVictims(service.scheduler, KVCacheManager(service.cache), sink=sink)


@pytest.mark.parametrize("seed", [24_185, 43_044, 46_170])
def test_what_once_failed_holds(seed: int) -> None:
    """The last event was not told; a victim gave no block back; a request was taken for live whose end was not told yet."""
    assert run_liveness(1, first_seed=seed).num_traces == 1


class FirstArrival:
    """Whoever came first goes first, so that two samples throw each other out in turn."""

    def choose(self, ranks: object, serials: object) -> int:
        return int(serials.argmin())


def knows_no_bound(service: Service, sink: EventSink) -> Scheduler:
    limits = dataclasses.replace(service.scheduler, max_preemptions=1000)
    return Scheduler(limits, KVCacheManager(service.cache), victim=FirstArrival(), sink=sink)


class ForgetsVictims(Shortage):
    """Whoever was preempted in a step that fails does not wait any more, nor run."""

    __slots__ = ()

    def forget_swaps(self) -> None:
        super().forget_swaps()
        for sample in self.preempted:
            self._queue.remove(sample)


def forgets_victims(service: Service, sink: EventSink) -> Scheduler:
    scheduler = build_scheduler(service, sink)
    scheduler._shortage.__class__ = ForgetsVictims
    return scheduler


BAD = {
    "waits for room": (waits_for_room, "I11"),
    "fences victims": (fences_victims, "I11"),
    "knows no bound": (knows_no_bound, "I13"),
    "forgets victims of failed steps": (forgets_victims, "I11"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_scheduler_is_found_out_that(name: str) -> None:
    factory, invariant = BAD[name]

    with pytest.raises(LivenessFailedError) as caught:
        run_liveness(1000, factory=factory)

    print(f"{name}: {caught.value}")
    assert caught.value.invariant == invariant


def test_a_failure_is_shrunk_and_its_command_repeats_it() -> None:
    with pytest.raises(LivenessFailedError) as caught:
        run_liveness(1000, factory=fences_victims)
    message, options = str(caught.value), caught.value.command.split()
    requests, faults = options[options.index("--only-requests") + 1], options[options.index("--only-faults") + 1]
    kept = [int(number) for number in requests.split(",")]

    with pytest.raises(LivenessFailedError) as again:
        run_liveness(1, first_seed=int(options[3]), only_requests=kept, only_faults=[], factory=fences_victims)

    assert faults == "none"
    assert len(kept) < 6
    assert message.endswith(f"again with: {caught.value.command}")
    assert again.value.command == caught.value.command
    assert str(again.value) == message


def test_the_command_takes_what_a_failure_prints() -> None:
    told = run(*["--first-seed", "18", "--traces", "2", "--only-requests", "0,3", "--only-faults", "none", "--json"])

    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    assert (report["num_traces"], report["num_requests"], report["faults"]) == (2, 4, {})


def test_the_command_refuses_numbers_that_are_none() -> None:
    refused = run("--traces", "1", "--only-requests", "0,x")

    assert refused.returncode == 2
    assert refused.stderr == "error: only-requests must be numbers such as 0,3, or none, found '0,x'\n"


@pytest.mark.parametrize("options", [{"only_requests": [99]}, {"only_faults": [-1]}, {"first_seed": -1}])
def test_numbers_that_are_not_there_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        run_liveness(1, **options)


def test_an_overload_is_drawn_from_its_seed_alone() -> None:
    first, again = (draw_overload(5) for _ in range(2))

    assert first.service == again.service
    assert first.faults == again.faults
    assert [step for step, _ in first.arrivals] == [step for step, _ in again.arrivals]


def test_what_is_stated_is_reached_where_one_request_runs_alone() -> None:
    """The bound is no looser than it need be: a prompt that is no longer than a chunk takes exactly as long."""
    shares = []
    for seed in range(20):
        overload = dataclasses.replace(draw_overload(seed).only([0], []), num_steps=0)
        trial = LivenessTrial(overload)
        trial.run()
        shares.append(trial.max_share)

    assert max(shares) == 1
