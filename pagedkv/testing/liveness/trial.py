"""Serves one overload: faults first, then none, and everybody who can be served is, in as many steps as were stated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pagedkv.errors import DuplicateIdError, InvalidArgumentError, InvariantViolation, StalePlanError, UnknownIdError
from pagedkv.scheduler import Event, Request, StepPlan
from pagedkv.scheduler.events import Finished
from pagedkv.testing.event_log import EventLogChecker
from pagedkv.testing.liveness.overload import Overload
from pagedkv.testing.soak.checkers import check_empty, steps_to_finish
from pagedkv.testing.soak.fault_sources import ScriptedFaults
from pagedkv.testing.soak.faulty_service import Faults, FaultyService
from pagedkv.testing.soak.scheduler_build import SchedulerFactory, build_scheduler
from pagedkv.testing.soak.settings import FaultKind
from pagedkv.testing.soak.traffic import fits_alone

__all__ = ["LivenessTrial"]


class LivenessTrial(FaultyService):
    """One service, from its first request to its last.

    It keeps books of who must be served and who was, from the events alone; prompts are simulated, so that what takes
    time is the scheduler. What the slots hold is the business of soak runs.
    """

    def __init__(self, overload: Overload, *, factory: SchedulerFactory = build_scheduler) -> None:
        self.overload = overload
        config, cache = overload.service.scheduler, overload.service.cache
        self.log = EventLogChecker(max_num_running=config.max_num_running, num_blocks=cache.num_blocks)
        super().__init__(overload.service, self, factory)
        self.samples_left: dict[str, int] = {}
        """Samples that each live request has still to finish."""
        self._requests: dict[str, Request] = {}
        self._faults = ScriptedFaults(overload.faults)
        self._arrivals = list(overload.arrivals)
        self._copies_will_fail = False
        self._num_aborts = 0
        self.max_share = 0.0
        """Steps that the faultless part took, as a share of those that were stated."""

    @property
    def now(self) -> float:
        """What the scheduler's clock shows."""
        return self.num_steps + self.skew_s

    def emit(self, event: Event) -> None:
        """Take an event: hold it against those before, and note who is served."""
        self.log.take({"event": type(event).__name__.lower(), **event._asdict()})
        if isinstance(event, Finished) and event.request_id in self.samples_left:
            self.samples_left[event.request_id] -= 1
            if not self.samples_left[event.request_id]:
                del self.samples_left[event.request_id]

    def run(self) -> None:
        """Serve to the end. Raises InvariantViolation for what does not hold."""
        while self.num_steps < self.overload.num_steps:
            self._step(self._faults.at(self.num_steps))
            self.num_steps += 1
        self._drain()

    # While things go wrong

    def _step(self, faults: Faults) -> None:
        self._arrive()
        self._strike(faults)
        self._arm(faults)
        self._copies_will_fail |= FaultKind.COPY_PARTIAL in faults
        plan = self._schedule() if self.scheduler.has_work else None
        if plan is not None:
            self._carry_out(plan, faults)
        self._disarm()

    def _arrive(self, *, ahead: int = 0) -> None:
        """Add who comes by now, or by some steps from now."""
        while self._arrivals and self._arrivals[0][0] <= self.num_steps + ahead:
            self._add(self._arrivals.pop(0)[1])

    def _add(self, request: Request) -> None:
        may_run = fits_alone(request, self.service)
        if may_run:
            self.samples_left[request.request_id] = request.n if request.max_new_tokens else 1
            self._requests[request.request_id] = request
        self._add_request(request, may_run=may_run)

    def _strike(self, faults: Faults) -> None:
        """Faults between two steps."""
        self.neighbour.leave(self.num_steps)
        self.skew_s += faults.get(FaultKind.CLOCK_JUMP, 0)
        if FaultKind.DUPLICATE_ID in faults and self.samples_left and not self.is_log_behind:
            twin = dataclasses.replace(self._requests[next(iter(self.samples_left))], max_new_tokens=1)
            self._expect(DuplicateIdError, lambda: self.scheduler.add(twin, self.now))
        if FaultKind.UNKNOWN_ID in faults:
            self._expect(UnknownIdError, lambda: self.scheduler.abort("nobody", self.now))
        if faults.get(FaultKind.ABORT, 1) % 2 == 0:
            self._num_aborts = faults[FaultKind.ABORT]
            self._abort_one()
        self._take_memory(faults)

    def _carry_out(self, plan: StepPlan, faults: Faults) -> None:
        """Report the plan as computed, or as failed; a lot may happen before."""
        if faults.get(FaultKind.ABORT, 0) % 2:
            self._num_aborts = faults[FaultKind.ABORT]
            self._abort_one()
        if FaultKind.COPY_LATE in faults:
            self._arrive(ahead=faults[FaultKind.COPY_LATE])
        if FaultKind.BAD_CALL in faults:
            self._expect(StalePlanError, lambda: self.scheduler.schedule(self.now))
            self._expect(InvalidArgumentError, lambda: self.scheduler.update(plan, None, float("nan")))
        num_copies = len(plan.swaps_out) + len(plan.copies) + len(plan.swaps_in)
        if FaultKind.COPY_NEVER in faults or (self._copies_will_fail and num_copies):
            self._copies_will_fail = False
            self._ignoring_sink(lambda: self.scheduler.fail(plan, self.now, "the device was lost"))
            self._expect(StalePlanError, lambda: self.scheduler.fail(plan, self.now))
            return
        self._ignoring_sink(lambda: self.scheduler.update(plan, None, self.now))
        if FaultKind.COPY_TWICE in faults:
            self._expect(StalePlanError, lambda: self.scheduler.update(plan, None, self.now))

    def _abort_one(self) -> None:
        """A client gives up, whatever state its request is in. Who is live is not known while the log is behind."""
        if self.samples_left and (self.sink.is_calling_back or not self.is_log_behind):
            request_id = list(self.samples_left)[self._num_aborts % len(self.samples_left)]
            del self.samples_left[request_id]
            self._abort_request(request_id)

    # Once nothing goes wrong any more

    def _drain(self) -> None:
        """Nobody comes and nothing fails: everybody gets through in the steps that the scheduler states (I11)."""
        self.neighbour.leave()
        while self._arrivals:
            self._add(self._arrivals.pop(0)[1])
        if self.is_log_behind and not self.scheduler.has_work:  # No step comes that would tell the rest.
            self.scheduler.update(self.scheduler.schedule(self.now), None, self.now)
        live = (self._requests[request_id] for request_id in self.samples_left)
        bound = steps_to_finish(live, self.service.scheduler)
        first_step = self.num_steps
        while self.scheduler.has_work:
            if self.num_steps - first_step == bound:
                raise InvariantViolation("I11", f"{sorted(self.samples_left)} are not through after {bound} steps")
            plan = self.scheduler.schedule(self.now)
            if not plan.num_rows:
                raise InvariantViolation("I11", f"{self.scheduler.num_waiting} samples wait, and nothing runs")
            # What the last fault has left untold is told by now; from here on the memory is the scheduler's own.
            self.log.max_preemptions = self.service.scheduler.max_preemptions
            self.scheduler.update(plan, None, self.now)
            self.num_steps += 1
        if self.samples_left:
            raise InvariantViolation("I11", f"{sorted(self.samples_left)} no longer run, and were not served")
        self.max_share = (self.num_steps - first_step) / bound if bound else 0.0
        check_empty(self.scheduler)
        self.log.finish(is_complete=True)

    # Calls and what they may raise

    def _expect(self, error: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
        except error:
            return
        raise InvariantViolation("I8", f"a call that should raise {error.__name__} went through")
