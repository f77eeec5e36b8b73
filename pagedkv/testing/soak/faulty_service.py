"""A scheduler on one service's memory, and the faults that strike it from outside, whoever keeps the books."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from pagedkv.errors import InvariantViolation, UnknownIdError
from pagedkv.scheduler import EventSink, Request, RequestTooLargeError, StepPlan
from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS, AllocationFaults, InjectedFailureError
from pagedkv.testing.soak.neighbour import Neighbour
from pagedkv.testing.soak.scheduler_build import SchedulerFactory, SinkRaisedError, WorldSink
from pagedkv.testing.soak.settings import FaultKind, Service

__all__ = ["Faults", "FaultyService"]

Faults = Mapping[FaultKind, int]
"""The faults of one step, each with its detail."""


class FaultyService(ABC):
    """What soak runs and liveness trials are made of: they say what comes and when, and keep books of who must be served."""

    def __init__(self, service: Service, log: EventSink, factory: SchedulerFactory) -> None:
        self.service = service
        self.sink = WorldSink(log)
        self.sink.call_back = self._abort_one
        self.scheduler = factory(service, self.sink)
        self.allocations = AllocationFaults(self.scheduler.manager.memory)
        self.neighbour = Neighbour(self.scheduler.manager)
        self.num_steps = 0
        self.skew_s = 0.0
        self.is_log_behind = False
        """Whether the last call that tells events was cut short, so that the next one tells the rest."""

    @property
    @abstractmethod
    def now(self) -> float:
        """The time that the scheduler is told: the world's, and what its clock is wrong by."""

    @abstractmethod
    def _abort_one(self) -> None:
        """A client gives up, whatever state its request is in."""

    # Faults

    def _take_memory(self, faults: Faults) -> None:
        """Somebody else takes memory that the scheduler had counted on, for some steps."""
        if FaultKind.DEVICE_FULL in faults:
            self.neighbour.take_device(self.num_steps + faults[FaultKind.DEVICE_FULL])
        if FaultKind.HOST_FULL in faults:
            self.neighbour.take_host(self.num_steps + faults[FaultKind.HOST_FULL])

    def _arm(self, faults: Faults) -> None:
        """Faults that strike inside of a call, until `_disarm`."""
        if FaultKind.ALLOCATION in faults:
            nth, point = divmod(faults[FaultKind.ALLOCATION], len(ALLOCATION_POINTS))
            self.allocations.arm(ALLOCATION_POINTS[point], max(nth, 1))
        self.sink.raises_in = faults.get(FaultKind.SINK_RAISES, 0)
        self.sink.calls_back_in = faults.get(FaultKind.SINK_CALLS_BACK, 0)

    def _disarm(self) -> None:
        """Nothing strikes inside of a call any more."""
        self.allocations.disarm()
        self.sink.raises_in = self.sink.calls_back_in = 0

    # Calls, whatever gets in their way

    def _schedule(self, drafts: Mapping[int, Sequence[int]] | None = None) -> StepPlan | None:
        """Plan a step; None if nothing came of it."""
        try:
            plan: StepPlan | None = self.scheduler.schedule(self.now, drafts)
            self.is_log_behind = False
        except InjectedFailureError:
            self.scheduler.check_invariants()
            self.is_log_behind = True
            plan = None
        except SinkRaisedError:
            self.is_log_behind = True
            plan = self.scheduler.in_flight
        self.allocations.disarm()
        return plan

    def _add_request(self, request: Request, *, may_run: bool) -> None:
        """Bring a request: admitted exactly if it could run alone (I12)."""
        try:
            self._ignoring_sink(lambda: self.scheduler.add(request, self.now))
        except RequestTooLargeError:
            if may_run:
                raise InvariantViolation("I12", f"{request.request_id!r} fits, and was refused") from None
            return
        if not may_run and not self.is_log_behind:
            raise InvariantViolation("I12", f"{request.request_id!r} can never fit, and was taken")

    def _abort_request(self, request_id: str) -> None:
        """Abort a live request, which must be known (I9)."""
        try:
            self._ignoring_sink(lambda: self.scheduler.abort(request_id, self.now))
        except UnknownIdError:
            # Called back in the middle of the call that ended it.
            if not self.sink.is_calling_back:
                raise InvariantViolation("I9", f"live request {request_id!r} is not known") from None

    def _ignoring_sink(self, call: Callable[[], object]) -> None:
        """What the sink raises comes after the work: the call has done its part."""
        try:
            call()
            self.is_log_behind = False
        except SinkRaisedError:
            self.is_log_behind = True
