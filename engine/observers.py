"""Everybody who hears what the engine does: metrics, a timeline, a record of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ParamSpec

from pagedkv.engine.held_errors import HeldErrors
from pagedkv.engine.live_requests import LiveSample
from pagedkv.engine.metrics import EngineMetrics
from pagedkv.engine.outputs import Completion
from pagedkv.engine.run_record import RunRecorder
from pagedkv.engine.timeline import StepTimes, Timeline
from pagedkv.scheduler import Event, Request, Scheduler, Seat, StepEvents, StepPlan
from pagedkv.scheduler.events import Admitted, Preempted

__all__ = ["Observers"]

P = ParamSpec("P")


class Observers:
    """The scheduler's event sink, and the one place that the engine tells of steps and requests.

    metrics:     always there
    timeline, recorder: or None; each ends with its first error (a disk is full), which `close` raises. Serving goes on
    on_seating: called when a request gets a seat for the first time, and when a sample loses its seat
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self.metrics = metrics
        self.timeline: Timeline | None = None
        self.recorder: RunRecorder | None = None
        self.on_seating: Callable[[Admitted | Preempted], None] | None = None
        self._last_arrival_s = -math.inf
        self._errors = HeldErrors("files that were being written")
        self._num_waiting = 0
        self._num_used_blocks = 0
        self._scheduler: Scheduler | None = None

    def watch(self, scheduler: Scheduler) -> None:
        """The scheduler whose events come is this one."""
        self._scheduler = scheduler
        self.metrics.watch(scheduler)

    def emit(self, event: Event) -> None:
        """Pass an event of the scheduler on. O(1)."""
        self.metrics.emit(event)
        if self.timeline is not None:
            self._to_timeline(self.timeline.emit, event)
        if self.on_seating is not None and (
            (isinstance(event, Admitted) and event.mode == "new") or isinstance(event, Preempted)
        ):
            self.on_seating(event)

    def on_request(self, request: Request, arrival_s: float) -> None:
        """A request was accepted."""
        if self.recorder is not None:
            # Requests of several threads need not line up in the order of their arrival; a record's do.
            self._last_arrival_s = max(self._last_arrival_s, arrival_s)
            self._to_recorder(self.recorder.on_request, request, self._last_arrival_s)

    def on_schedule(self, plan: StepPlan) -> None:
        """A step was planned; the counters as they are while it runs are noted."""
        if self.timeline is not None:
            self._to_timeline(self.timeline.on_schedule, plan)
        if self.recorder is not None and self._scheduler is not None:
            self._num_waiting = self._scheduler.num_waiting
            self._num_used_blocks = self._scheduler.manager.memory.pool.num_used

    def on_seats(self, seats: Sequence[Seat]) -> None:
        """Requests that have these seats end before the step in which they got them is told. O(seats)."""
        if self.recorder is not None:
            self._to_recorder(self.recorder.on_seats, seats)

    def on_step(self, plan: StepPlan, events: StepEvents, times: StepTimes) -> None:
        """A step was carried out and updated. O(rows) array operations."""
        self.metrics.on_step(plan, events, times.start_s, times.end_s)
        if self.timeline is not None:
            self._to_timeline(self.timeline.on_step, plan, events, times)
        if self.recorder is not None:
            self._to_recorder(
                self.recorder.on_step,
                plan,
                times.start_s,
                times.end_s,
                num_waiting=self._num_waiting,
                num_used_blocks=self._num_used_blocks,
            )

    def on_drafter_error(self, _error: Exception) -> None:
        """The drafter raised: some samples go without guesses."""
        self.metrics.on_drafter_error()

    def on_finish(self, sample: LiveSample, completion: Completion, now: float) -> None:
        """A sample has ended."""
        if self.recorder is not None:
            self._to_recorder(
                self.recorder.on_finish,
                sample.request.request_id,
                sample.index,
                completion.finish_reason,
                first_token_s=sample.first_token_s,
                end_s=now,
                num_output_tokens=len(completion.token_ids),
                num_preemptions=sample.num_preemptions,
            )

    def close(self) -> None:
        """Complete the files. Raises the error with which one ended, an ExceptionGroup for both; once."""
        if self.timeline is not None:
            self._to_timeline(self.timeline.close)
        if self.recorder is not None:
            self._to_recorder(self.recorder.close)
        self._errors.raise_all()

    def _to_timeline(self, tell: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self.timeline is not None and not self._errors.call(tell, *args, **kwargs):
            self.timeline.abandon()
            self.timeline = None

    def _to_recorder(self, tell: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self.recorder is not None and not self._errors.call(tell, *args, **kwargs):
            self.recorder.abandon()
            self.recorder = None
