"""The virtual engine: the scheduler that engines embed, driven by a cost model and a virtual clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Rows
from pagedkv.content import SimulatedPrompt
from pagedkv.errors import InvariantViolation
from pagedkv.scheduler import Request, RequestTooLargeError, Scheduler, StepEvents, StepPlan
from pagedkv.scheduler.events import Admitted, Event, EventSink, Preempted
from pagedkv.simulations.cost_models import CostModel, StepLoad
from pagedkv.simulations.run import RequestLog
from pagedkv.simulations.step_log import StepLog, TokenGaps
from pagedkv.simulations.traces import Trace

__all__ = ["EventTee", "Simulator", "load_of"]

CHECK_EVERY = 1000


def load_of(plan: StepPlan) -> StepLoad:
    """Sum a plan up for a cost model. O(rows)."""
    num_rows = len(plan.rows)
    num_tokens = int(np.add.reduce(plan.num_tokens))
    sum_starts = int(np.add.reduce(plan.starts))
    if num_tokens == num_rows:
        num_pairs = sum_starts + num_rows
    else:
        # n tokens from position s on see n * s + n * (n + 1) / 2 keys.
        num_pairs = int(np.dot(plan.num_tokens, 2 * plan.starts + plan.num_tokens + 1)) // 2
    return StepLoad(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_sampled=len(plan.sampling_rows),
        num_context_tokens=sum_starts + num_tokens,
        num_attention_pairs=num_pairs,
        num_copied_blocks=len(plan.copies),
        num_swapped_in_blocks=len(plan.swaps_in),
        num_swapped_out_blocks=len(plan.swaps_out),
    )


class EventTee:
    """Keeps what the metrics need of the scheduler's events, and passes all of them on."""

    def __init__(self, log: RequestLog, sink: EventSink | None = None) -> None:
        self._log = log
        self._sink = sink
        self.preemptions: list[Preempted] = []
        self.num_swaps = 0

    def emit(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, Admitted):
            request = int(event.request_id)
            if event.mode == "new":
                self._log.admitted_s[request] = event.time
                self._log.num_hit[request] = event.num_hit_tokens
        elif isinstance(event, Preempted):
            self.preemptions.append(event)
            self._log.num_preemptions[int(event.request_id)] += 1
        if self._sink is not None:
            self._sink.emit(event)


class Simulator:
    """Replays a trace: requests arrive at their time, a step takes as long as the cost model says.

    Requests are named by their index in the trace; equal arrival times keep that order. A request that arrives while a
    step runs is added then, and considered when the next step is planned. With `leaps`, runs of steps that are sure to
    be the same plan one token further are taken at once; the outcome is identical, to the last bit.
    """

    def __init__(
        self, trace: Trace, scheduler: Scheduler, cost_model: CostModel, log: RequestLog, *, leaps: bool = True
    ) -> None:
        self.trace = trace
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._leaps = leaps
        self._arrivals: list[float] = [*trace.arrival_s.tolist(), float("inf")]
        self._num_arrived = 0
        self._request_of_row: NDArray[np.int64] = np.zeros(64, np.int64)
        self._last_token_s = np.full(len(trace), np.nan)
        self._step_s = 1e-3
        """Length of the last step of the last leap, a guess at the next ones."""
        self.log = log
        self.steps = StepLog()
        self.gaps = TokenGaps()
        self.rejections: dict[int, str] = {}

    def run(self, progress: Callable[[int], None] | None = None, *, checks: bool = False) -> None:
        """Replay the whole trace. `progress` gets the number of ended requests now and then.

        `checks` recounts every invariant after each 1,000 plans or leaps and at the end.
        """
        clock = 0.0
        num_plans = 0
        scheduler, arrivals = self._scheduler, self._arrivals
        while scheduler.has_work or self._num_arrived < len(self.trace):
            if not scheduler.has_work:
                clock = max(clock, arrivals[self._num_arrived])
            self._add_arrivals(clock)
            if scheduler.has_work:
                num_ahead = scheduler.num_steps_ahead() if self._leaps else 0
                clock = self._leap(clock, num_ahead) if num_ahead else self._step(clock)
            num_plans += 1
            if num_plans % CHECK_EVERY == 0:
                if checks:
                    scheduler.check_invariants()
                if progress is not None:
                    progress(int(np.count_nonzero(~np.isnan(self.log.finished_s))) + len(self.rejections))
        if checks:
            scheduler.check_invariants()

    def _step(self, start: float) -> float:
        """Plan and carry out one step; returns the time at its end."""
        scheduler = self._scheduler
        plan = scheduler.schedule(start)
        if not len(plan.rows):
            raise InvariantViolation("I11", f"{scheduler.num_waiting} requests wait and none can run")
        self._note_admitted(plan)
        load = load_of(plan)
        duration = float(self._cost_model.step_time(load))
        end = start + duration
        num_used = scheduler.manager.memory.pool.num_used
        num_tokens = int(load.num_tokens)
        self.steps.append((start, end - start, len(plan.rows), scheduler.num_waiting, num_tokens, num_used))
        self._add_arrivals(end)
        events = scheduler.update(plan, self._sampled_tokens(plan), end)
        self._note_tokens(plan.sampling_rows, end)
        self._note_finished(events, end)
        return end

    def _leap(self, start: float, num_ahead: int) -> float:
        """Take as many of the steps ahead as begin before the next arrival; returns the time at their end."""
        scheduler = self._scheduler
        rows = scheduler.running_rows
        num_rows = len(rows)
        num_context = int(np.add.reduce(scheduler.manager.memory.sequences.num_computed[rows]))
        next_arrival = self._arrivals[self._num_arrived]
        # Cost no more steps than are likely to fit before the next arrival; if more would, another leap follows.
        num_likely = min(1.25 * (next_arrival - start) / max(self._step_s, 1e-9) + 4, num_ahead)
        contexts = num_context + num_rows * np.arange(1, int(num_likely) + 1)
        times = np.empty(len(contexts) + 1)
        times[0] = start
        times[1:] = self._cost_model.step_time(StepLoad(num_rows, num_rows, num_rows, contexts, contexts))
        times.cumsum(out=times)
        num_steps = int(times[1:-1].searchsorted(next_arrival)) + 1
        times = times[: num_steps + 1]
        end = float(times[-1])
        num_waiting = scheduler.num_waiting
        self._add_arrivals(end)
        events, used_blocks = scheduler.leap(num_steps, end)
        gaps = times[1:] - times[:-1]
        self._step_s = float(gaps[-1])
        self.steps.append_many(times[:-1], gaps, used_blocks, num_rows=num_rows, num_waiting=num_waiting)
        # Every row got a token in the step before, too, so a step's length is the gap for all.
        self.gaps.add_steps(gaps, num_rows)
        self._last_token_s[self._request_of_row[events.rows]] = end
        self._note_finished(events, end)
        return end

    def _add_arrivals(self, until: float) -> None:
        """Add every request that has arrived by `until`."""
        arrivals = self._arrivals
        while arrivals[self._num_arrived] <= until:
            index = self._num_arrived
            self._num_arrived += 1
            try:
                self._scheduler.add(self._request(index), arrivals[index])
            except RequestTooLargeError as error:
                self.rejections[index] = str(error)
                self.log.is_rejected[index] = True

    def _request(self, index: int) -> Request:
        trace = self.trace
        num_tokens = int(trace.prompt_tokens[index])
        if trace.content_block_size is None:
            prompt = SimulatedPrompt(num_tokens)
        else:
            prompt = SimulatedPrompt(num_tokens, trace.content_ids(index), trace.content_block_size)
        client = None if trace.clients is None else int(trace.clients[index])
        priority = 0.0 if trace.priorities is None else float(trace.priorities[index])
        return Request(str(index), prompt, int(trace.output_tokens[index]), client=client, priority=priority)

    def _sampled_tokens(self, plan: StepPlan) -> Int32s | None:  # noqa: ARG002 - for those who know more than lengths
        """Tokens for the plan's sampling rows; None, since only their number matters here."""
        return None

    def _note_admitted(self, plan: StepPlan) -> None:
        for seat in plan.admitted:
            if seat.row >= len(self._request_of_row):
                self._request_of_row = np.resize(self._request_of_row, 2 * seat.row)
            self._request_of_row[seat.row] = int(seat.request_id)

    def _note_tokens(self, rows: Rows, end: float) -> None:
        """Note the times of a step's tokens: first ones, and the gaps before the others."""
        requests = self._request_of_row[rows]
        gaps = end - self._last_token_s[requests]
        is_first = np.isnan(gaps)
        if is_first.any():
            self.log.first_token_s[requests[is_first]] = end
            gaps = gaps[~is_first]
        if len(gaps):
            self.gaps.add(gaps)
        self._last_token_s[requests] = end

    def _note_finished(self, events: StepEvents, end: float) -> None:
        for sample, _ in events.finished:
            request = int(sample.request.request_id)
            self.log.finished_s[request] = end
            self.log.num_output[request] = self.trace.output_tokens[request]
            if sample.request.max_new_tokens == 0:
                self.log.first_token_s[request] = end
