"""The counters of a running engine, fed by the scheduler's events and by each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Rows, as_int
from pagedkv.content import MAX_TOKENS
from pagedkv.engine.metrics.histograms import Histogram
from pagedkv.engine.metrics.names import COUNTERS, histogram_bounds
from pagedkv.engine.metrics.snapshot import MetricsSnapshot
from pagedkv.scheduler import Event, FinishReason, Scheduler, Seat, StepEvents, StepPlan
from pagedkv.scheduler.events import Aborted, Added, Admitted, Finished, Preempted, Refused, StepFailed

__all__ = ["EngineMetrics"]

NAN = math.nan


class _Request:
    """What is known of a live request."""

    __slots__ = ("admitted_s", "arrival_s", "num_prompt", "samples")

    def __init__(self, arrival_s: float, num_prompt: int) -> None:
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.admitted_s = NAN
        self.samples: dict[int, _Sample] = {0: _Sample(self, 0)}


class _Sample:
    """What is known of a live sample. While it holds a seat in `row`, the time of its last token is in the column."""

    __slots__ = ("first_token_s", "last_token_s", "request", "row", "sample_idx")

    def __init__(self, request: _Request, sample_idx: int) -> None:
        self.request = request
        self.sample_idx = sample_idx
        self.row = -1
        self.first_token_s = NAN
        self.last_token_s = NAN


class EngineMetrics:
    """Counts what an engine does. It is the scheduler's event sink, and hears of each step once that was updated.

    Everything is fed by one thread; `snapshot` may be called from any, under a lock that each feeding call holds for
    microseconds. A step costs a fixed number of array operations over its rows, and Python-level work only for samples
    that are seated, get their first token, or end. Times are seconds of one clock, the one handed to the scheduler.

    What is told of a prompt is counted once per request, what is told of output once per sample.

        metrics = EngineMetrics()
        scheduler = Scheduler(config, manager, sink=metrics)
        metrics.watch(scheduler)
        ...
        events = scheduler.update(plan, token_ids, now=end_s)
        metrics.on_step(plan, events, start_s, end_s)
    """

    def __init__(self, *, max_model_len: int = 131_072) -> None:
        """`max_model_len` ends the buckets of tokens per request."""
        as_int("max_model_len", max_model_len, at_least=1, at_most=MAX_TOKENS)
        self._lock = Lock()
        self._scheduler: Scheduler | None = None
        self._num_running = self._num_waiting = self._num_used = 0
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._num_ended = {reason.value: 0 for reason in FinishReason}
        self._histograms = {name: Histogram(bounds) for name, bounds in histogram_bounds(max_model_len).items()}
        self._token_gaps = self._histograms["inter_token_latency_seconds"]
        self._step_tokens = self._histograms["iteration_tokens_total"]
        self._step_times = self._histograms["step_time_seconds"]
        self._requests: dict[str, _Request] = {}
        self._finished: list[Finished] = []
        # By row: the time of the last token, NaN before the first; and whose row it is.
        self._last_token_s: NDArray[np.float64] = np.full(64, NAN)
        self._seated: list[_Sample | None] = [None] * 64
        self._takers: dict[type[Any], Callable[[Any], None]] = {
            Added: self._take_added,
            Refused: self._take_refused,
            Admitted: self._take_admitted,
            Preempted: self._take_preempted,
            Finished: self._finished.append,  # Its last token is not counted yet: it ends in `on_step`.
            Aborted: self._take_aborted,
            StepFailed: self._take_failed,
        }

    def watch(self, scheduler: Scheduler) -> None:
        """Read the gauges from this scheduler from now on; before, they are 0."""
        with self._lock:
            self._scheduler = scheduler
            self._read_gauges()

    # Feeding

    def emit(self, event: Event) -> None:
        """Take an event of the scheduler. O(1)."""
        take = self._takers.get(type(event))
        with self._lock:
            if take is not None:
                take(event)
            self._read_gauges()

    def on_step(self, plan: StepPlan, events: StepEvents, start_s: float, end_s: float) -> None:
        """Take a step that was carried out from `start_s` to `end_s`, once the scheduler was updated. O(rows)."""
        rows = events.rows
        with self._lock:
            if plan.admitted:
                self._seat(plan.admitted)
            self._counts["generation_tokens"] += self._num_new(plan, events)
            if len(rows):
                self._record_tokens(rows, end_s)
            if len(plan.rows):
                self._step_tokens.observe(int(np.add.reduce(plan.num_tokens)))
                self._step_times.observe(end_s - start_s)
            if self._finished:
                self._end_finished(end_s)
            self._read_gauges()

    def on_drafter_error(self) -> None:
        """A drafter raised, and its guesses were done without. O(1)."""
        with self._lock:
            self._counts["num_drafter_errors"] += 1

    # Reading

    def snapshot(self) -> MetricsSnapshot:
        """All metrics between two steps, from any thread."""
        with self._lock:
            pool = None if self._scheduler is None else self._scheduler.manager.memory.pool
            # The counters and histograms are fields by the names in `names.py`.
            named: dict[str, Any] = {name: histogram.snapshot() for name, histogram in self._histograms.items()}
            named |= self._counts
            return MetricsSnapshot(
                num_requests_running=self._num_running,
                num_requests_waiting=self._num_waiting,
                kv_cache_usage_perc=0.0 if pool is None else self._num_used / pool.num_blocks,
                request_success=MappingProxyType(self._num_ended.copy()),
                **named,
            )

    # Events

    def _take_added(self, event: Added) -> None:
        self._requests[event.request_id] = _Request(event.time, event.num_prompt_tokens)

    def _take_refused(self, event: Refused) -> None:  # noqa: ARG002 - all takers have one shape
        self._counts["num_requests_refused"] += 1

    def _take_failed(self, event: StepFailed) -> None:  # noqa: ARG002
        self._counts["num_failed_steps"] += 1

    def _take_admitted(self, event: Admitted) -> None:
        # Whoever comes back finds mostly its own blocks again, which says nothing about the cache.
        request = self._requests.get(event.request_id)
        if event.mode != "new" or request is None:
            return
        self._counts["prefix_cache_queries"] += event.num_known_tokens
        self._counts["prefix_cache_hits"] += event.num_hit_tokens
        request.admitted_s = event.time
        self._histograms["request_queue_time_seconds"].observe(event.time - request.arrival_s)

    def _take_preempted(self, event: Preempted) -> None:
        self._counts["num_preemptions"] += 1
        request = self._requests.get(event.request_id)
        sample = None if request is None else request.samples.get(event.sample_idx)
        if sample is not None and sample.row >= 0:
            sample.last_token_s = float(self._last_token_s[sample.row])
            sample.row = -1

    def _take_aborted(self, event: Aborted) -> None:
        self._requests.pop(event.request_id, None)  # One event per sample: the first one ends them all.
        self._num_ended[FinishReason.ABORT.value] += 1

    # Steps

    def _seat(self, seats: tuple[Seat, ...]) -> None:
        """Rows that were given to samples: each takes the time of its last token along."""
        for row, request_id, sample_idx in seats:
            while row >= len(self._seated):
                self._seated += [None] * len(self._seated)
                self._last_token_s = np.concatenate((self._last_token_s, np.full_like(self._last_token_s, NAN)))
            self._seated[row] = None
            self._last_token_s[row] = NAN
            request = self._requests.get(request_id)
            # Since the plan the request may have been aborted, and even another added under its name.
            if request is None or math.isnan(request.admitted_s):
                continue
            if sample_idx not in request.samples:
                request.samples[sample_idx] = _Sample(request, sample_idx)
            sample = self._seated[row] = request.samples[sample_idx]
            sample.row = row
            self._last_token_s[row] = sample.last_token_s

    def _record_tokens(self, rows: Rows, end_s: float) -> None:
        gaps = end_s - self._last_token_s[rows]
        self._last_token_s[rows] = end_s
        if math.isnan(np.add.reduce(gaps)):
            is_first = np.isnan(gaps)
            for row in rows[is_first].tolist():
                sample = self._seated[row]
                if sample is not None:
                    self._record_first_token(sample, end_s)
            gaps = gaps[~is_first]
        if len(gaps):
            self._token_gaps.observe_many(gaps)

    def _record_first_token(self, sample: _Sample, end_s: float) -> None:
        sample.first_token_s = end_s
        self._histograms["time_to_first_token_seconds"].observe(end_s - sample.request.arrival_s)
        if sample.sample_idx == 0:
            self._record_prompt(sample.request, end_s)

    def _record_prompt(self, request: _Request, end_s: float) -> None:
        self._counts["prompt_tokens"] += request.num_prompt
        self._histograms["request_prompt_tokens"].observe(request.num_prompt)
        self._histograms["request_prefill_time_seconds"].observe(end_s - request.admitted_s)

    def _num_new(self, plan: StepPlan, events: StepEvents) -> int:
        """How many tokens the step gave; counts the drafts among them."""
        rows, num_tokens = events.rows, events.num_tokens
        if num_tokens is None:
            return len(rows)
        num_new = int(np.add.reduce(num_tokens))
        if plan.drafts is not None:
            num_drafts = plan.drafts.num_tokens
            if len(rows) < len(num_drafts):  # Drafts of requests that were aborted meanwhile came to nothing.
                num_drafts = num_drafts[np.isin(plan.sampling_rows, rows)]
            self._counts["spec_decode_num_drafts"] += int(np.count_nonzero(num_drafts))
            self._counts["spec_decode_num_draft_tokens"] += int(np.add.reduce(num_drafts))
            self._counts["spec_decode_num_accepted_tokens"] += num_new - len(rows)  # A row's last one is no draft.
        return num_new

    def _end_finished(self, end_s: float) -> None:
        """End the samples of which the scheduler said that they finished in this step."""
        for event in self._finished:
            self._num_ended[event.reason] = self._num_ended.get(event.reason, 0) + 1
            request = self._requests.get(event.request_id)
            sample = None if request is None else request.samples.pop(event.sample_idx, None)
            if request is None or sample is None:
                continue
            if not request.samples:
                del self._requests[event.request_id]
            if event.num_output_tokens:
                self._histograms["request_decode_time_seconds"].observe(end_s - sample.first_token_s)
            else:
                self._record_prompt(request, end_s)
            self._histograms["request_generation_tokens"].observe(event.num_output_tokens)
            self._histograms["e2e_request_latency_seconds"].observe(end_s - request.arrival_s)
        self._finished.clear()

    def _read_gauges(self) -> None:
        scheduler = self._scheduler
        if scheduler is not None:
            self._num_running = scheduler.num_running
            self._num_waiting = scheduler.num_waiting
            self._num_used = scheduler.manager.memory.pool.num_used
