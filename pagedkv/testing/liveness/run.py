"""Overload after overload, one for each seed; what fails is shrunk and named by one command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pagedkv.arrays import as_int
from pagedkv.testing.liveness.overload import Overload, draw_overload
from pagedkv.testing.liveness.trial import LivenessTrial
from pagedkv.testing.shrinking import shrink_list
from pagedkv.testing.soak.run_failed import RunFailedError
from pagedkv.testing.soak.scheduler_build import SchedulerFactory, build_scheduler

__all__ = ["LivenessFailedError", "LivenessReport", "run_liveness"]

MAX_TRACES = 10**9


class LivenessFailedError(RunFailedError):
    """Somebody was not served, or something else did not hold. The message says what, and which command does it again."""

    def __init__(self, overload: Overload, requests: list[int], faults: list[int], error: BaseException) -> None:
        command = f"pagedkv liveness --first-seed {overload.seed} --traces 1"
        for option, numbers in (("--only-requests", requests), ("--only-faults", faults)):
            command += f" {option} {','.join(map(str, numbers)) or 'none'}"
        where = (
            f"seed {overload.seed}, shrunk to {len(requests)} of {len(overload.arrivals)} requests and "
            f"{len(faults)} of {len(overload.faults)} faults, {overload.service}"
        )
        super().__init__(error, where, command)


@dataclass(slots=True)
class LivenessReport:
    """What came of a run; it follows from the seeds. `max_share` is the largest share of the stated steps that was taken."""

    first_seed: int
    num_traces: int = 0
    num_requests: int = 0
    num_served: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0
    num_steps: int = 0
    max_preemptions: int = 0
    max_share: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)

    def add(self, trial: LivenessTrial) -> None:
        """Add what one trial has gone through."""
        told = trial.log.summary
        self.num_traces += 1
        self.num_requests += told.num_added
        self.num_served += told.num_added - told.num_aborted_requests
        self.num_preemptions += told.num_preemptions
        self.num_failed_steps += told.num_failed_steps
        self.num_steps += trial.num_steps
        self.max_preemptions = max(self.max_preemptions, told.max_preemptions)
        self.max_share = max(self.max_share, trial.max_share)
        for fault in trial.overload.faults:
            self.faults[str(fault.kind)] = self.faults.get(str(fault.kind), 0) + 1


def run_liveness(
    num_traces: int,
    *,
    first_seed: int = 0,
    only_requests: list[int] | None = None,
    only_faults: list[int] | None = None,
    progress: Callable[[int], None] | None = None,
    factory: SchedulerFactory = build_scheduler,
) -> LivenessReport:
    """Serve the overloads of `num_traces` seeds. Raises LivenessFailedError, shrunk, at the first that fails.

    `only_requests` and `only_faults` leave out all others of each overload, by number: what a shrunk failure is
    repeated with. `factory` builds another scheduler than pagedkv's own. Raises InvalidArgumentError for counts out of range.
    """
    as_int("traces", num_traces, at_least=1, at_most=MAX_TRACES)
    as_int("first-seed", first_seed, at_least=0, at_most=2**63 - 1)
    report = LivenessReport(first_seed)
    for seed in range(first_seed, first_seed + num_traces):
        overload = draw_overload(seed)
        requests = _numbers(only_requests, len(overload.arrivals))
        faults = _numbers(only_faults, len(overload.faults))
        try:
            trial = LivenessTrial(overload.only(requests, faults), factory=factory)
            trial.run()
        except Exception as error:
            raise _shrunk(overload, requests, faults, error, factory) from error
        report.add(trial)
        if progress is not None:
            progress(report.num_traces)
    return report


def _numbers(only: list[int] | None, count: int) -> list[int]:
    """The numbers that are asked for; all that there are by default."""
    numbers = list(range(count)) if only is None else only
    for number in numbers:
        as_int("only-requests and only-faults", number, at_least=0, at_most=count - 1)
    return numbers


def _shrunk(
    overload: Overload, requests: list[int], faults: list[int], error: BaseException, factory: SchedulerFactory
) -> LivenessFailedError:
    """Leave out requests and faults as long as the rest fails in the same way. Faults go first: they come last here."""

    def failure(kept: list[tuple[bool, int]]) -> BaseException | None:
        try:
            LivenessTrial(overload.only(_of(kept, False), _of(kept, True)), factory=factory).run()
        except Exception as again:  # noqa: BLE001 - whatever it is, it is compared
            return again
        return None

    def fails(kept: list[tuple[bool, int]]) -> bool:
        return _way(failure(kept)) == _way(error)

    everything = [*((False, i) for i in requests), *((True, i) for i in faults)]
    kept = shrink_list(everything, fails)
    return LivenessFailedError(overload, _of(kept, False), _of(kept, True), failure(kept) or error)


def _of(kept: list[tuple[bool, int]], is_fault: bool) -> list[int]:
    return [number for kind, number in kept if kind is is_fault]


def _way(error: BaseException | None) -> tuple[type[BaseException], str | None]:
    """What two failures have in common."""
    return type(error) if error is not None else BaseException, getattr(error, "invariant", None)
