"""The scheduler: who runs in the next step, with how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows
from pagedkv.errors import DuplicateIdError, InvalidArgumentError, StalePlanError, UnknownIdError
from pagedkv.manager import KVCacheManager
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.scheduler.admission import Admission, Grants
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.ending import at_length, at_stop_token, prefilled
from pagedkv.scheduler.events import Aborted, Added, Event, EventSink, Finished, Refused, StepFailed
from pagedkv.scheduler.kinds import LiveKinds
from pagedkv.scheduler.order import FCFS, LatestArrival, QueuePolicy, VictimPolicy
from pagedkv.scheduler.plan import PlanInputs, Seat, StepEvents, StepPlan
from pagedkv.scheduler.preemption import PreemptionPolicy, Recompute
from pagedkv.scheduler.recount import check_samples
from pagedkv.scheduler.refusal import RequestTooLargeError, reason_to_refuse
from pagedkv.scheduler.request import Request
from pagedkv.scheduler.rollback import retract_step
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.shortage import Shortage
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["Scheduler"]

NO_ROWS = np.empty(0, np.int64)
NO_GRANTS = Grants()


def _require_time(now: float) -> None:
    """Raise InvalidArgumentError unless `now` is a finite number: places in the queue and event logs depend on it."""
    if not isinstance(now, float | int | np.number) or not math.isfinite(now):
        raise InvalidArgumentError(f"now must be a finite number of seconds, found {now!r}")


class Scheduler:
    """Continuous batching over one memory: `add` requests, then `schedule`, compute, `update`, again and again.

    A request has `num_known` tokens, of which `num_computed` have their K/V; a step plans how far each row catches up
    under one token budget. There is no prefill phase and no decode phase. Running rows come first, in order of admission,
    then waiting requests, in the queue policy's order. When blocks run short for the running rows, victims lose their
    seat one at a time until there are enough. Nothing here reads a clock; `now` only orders events and ages priorities.

    Events reach the sink when the call that caused them has done its work, so a sink that raises leaves the scheduler
    consistent; a plan that was made all the same is `in_flight`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        manager: KVCacheManager,
        *,
        policy: QueuePolicy | None = None,
        victim: VictimPolicy | None = None,
        preemption: PreemptionPolicy | None = None,
        sink: EventSink | None = None,
    ) -> None:
        self.config = config
        self.manager = manager
        self._memory = manager.memory
        self.policy = FCFS() if policy is None else policy
        self.victim = LatestArrival() if victim is None else victim
        self.preemption = Recompute() if preemption is None else preemption
        self._sink = sink
        self._events: list[Event] = []
        self._queue = WaitingQueue()
        self._running = RunningRows()
        self._admission = Admission(config, self._memory, self._queue, self._running, self._events)
        self._shortage = Shortage(
            self._memory,
            self._queue,
            self._running,
            victim=self.victim,
            preemption=self.preemption,
            events=self._events,
        )
        self._live: dict[str, list[Sample]] = {}
        self.in_flight: StepPlan | None = None
        """The plan that awaits `update` or `fail`."""
        self._all_decode = False
        """Whether every running row has exactly its last token left to compute."""
        self._grants = NO_GRANTS
        self._forked: list[tuple[Sample, Sample]] = []
        self._unannounced: list[Sample] = []
        self._step = 0
        self._num_added = 0
        self._kinds = LiveKinds()
        self._num_left_in_flight = 0

    # Requests

    def add(self, request: Request, now: float) -> None:
        """Put a request into the waiting queue. O(prompt + log waiting); its prompt is hashed when it is first considered.

        Raises DuplicateIdError, InvalidArgumentError, and RequestTooLargeError with the arithmetic if it can never fit.
        """
        _require_time(now)
        request_id = request.request_id
        if request_id in self._live:
            raise DuplicateIdError(f"request {request_id!r} is live already")
        content, num_prompt = self.manager.make_content(
            request.prompt, salt=request.salt, adapter=request.adapter, extras=request.extras
        )
        reason = reason_to_refuse(
            request,
            num_prompt,
            self.config,
            num_blocks=self._memory.pool.num_blocks,
            block_size=self._memory.block_size,
        )
        if reason:
            self._events.append(Refused(now, request_id, reason))
            self._deliver()
            raise RequestTooLargeError(f"request {request_id!r} can never run: {reason}")
        self._num_added += 1
        sample = Sample(request, content, num_prompt, rank=self.policy.rank(request, now), serial=self._num_added)
        self._live[request_id] = [sample]
        self._queue.push(sample)
        self._admission.is_open = True
        self._kinds.add(sample)
        self._events.append(Added(now, request_id, num_prompt, request.max_new_tokens))
        self._deliver()

    def abort(self, request_id: str, now: float) -> None:
        """End a request in whatever state it is, and let go of all it holds. O(log waiting + its blocks)."""
        _require_time(now)
        samples = self._live.pop(request_id, None)
        if samples is None:
            raise UnknownIdError(f"no live request {request_id!r}")
        for sample in samples:
            state = sample.state
            if state is SampleState.RUNNING:
                if self.in_flight is not None:
                    self.in_flight.make_inputs()
                self._leave(sample)
                self._num_left_in_flight += 1
            else:
                self._queue.remove(sample)
                if state is SampleState.SWAPPED:
                    self._memory.close(sample.row)
            sample.state = SampleState.FINISHED
            self._kinds.remove(sample)
            self._events.append(Aborted(now, request_id, state.value))
        self._admission.is_open = True
        self._deliver()

    # Steps

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step; it may be empty. Carry it out, then call `update` or `fail`. O(running) array operations."""
        _require_time(now)
        if self.in_flight is not None:
            raise StalePlanError(f"step {self.in_flight.step} is in flight: update it or fail it first")
        self._all_decode = False
        self._memory.begin_step()
        self._shortage.begin_step()
        self._forked.clear()
        rows, starts, num_tokens, copies = self._plan_running(now)
        self._grants = grants = NO_GRANTS
        # A step that preempts admits nobody: no row of its plan can then be a victim of it, or come back in it.
        if self._admission.is_open and len(self._queue) and not self._shortage.preempted:
            grants = self._grants = self._admit(rows, starts, num_tokens, now)
            if grants.rows:
                rows = np.concatenate((rows, np.array(grants.rows)))
                starts = np.concatenate((starts, np.array(grants.starts)))
                num_tokens = np.concatenate((num_tokens, np.array(grants.num_tokens)))
                copies += grants.copies
        sampling_rows, sources = self._choose_sampling(rows, starts + num_tokens)
        admitted = self._admitted_seats()
        plan = StepPlan(
            step=self._step,
            rows=rows,
            num_tokens=num_tokens,
            starts=starts,
            sampling_rows=sampling_rows,
            sampling_sources=sources,
            admitted=admitted,
            swaps_out=self._shortage.swaps_out,
            copies=copies,
            swaps_in=grants.swaps_in,
            inputs=PlanInputs(self._memory),
        )
        self._step += 1
        self.in_flight = plan
        self._deliver()
        return plan

    def update(self, plan: StepPlan, token_ids: Sequence[int] | Int32s | None, now: float) -> StepEvents:
        """Take the tokens sampled for `plan.sampling_rows`, in that order; None if all prompts are simulated.

        O(sampled) array operations; Python-level work only for rows that fill a block or end.
        Raises StalePlanError for a plan that is not in flight, InvalidArgumentError for wrong tokens; nothing changes then.
        """
        _require_time(now)
        tokens = self._check_outcome(plan, token_ids)
        rows = plan.sampling_rows
        ended = self._close_plan(plan)
        if ended:
            is_live = self._running.samples[rows] != None  # noqa: E711 - elementwise
            rows = rows[is_live]
            tokens = None if tokens is None else tokens[is_live]
        self._memory.end_step()
        self._memory.extend(rows, tokens)
        self._all_decode = (
            len(plan.sampling_rows) == len(plan.rows) == len(self._running) > 0
            and not ended
            and not self._kinds.num_with_tokens
            and self._memory.can_repeat
        )
        return self._collect(plan.rows, rows, tokens, now)

    def fail(self, plan: StepPlan, now: float, reason: str = "") -> None:
        """The step was not carried out: take back what it planned, so that its rows are planned again. O(rows + blocks).

        Names that the step gave are forgotten, slots taken back; samples whose blocks were to be moved by the step start
        over from what is sure to be on the device.
        """
        _require_time(now)
        self._check_in_flight(plan)
        self._close_plan(plan)
        for first, sibling in self._forked:
            self._undo_fork(first, sibling)
        retract_step(plan, self._grants.swapped_in, self._memory, self._running)
        self._shortage.forget_swaps()
        seated = (self._running.samples[seat.row] for seat in plan.admitted)
        self._unannounced = [sample for sample in seated if sample is not None]
        self._admission.is_open = True
        self._events.append(StepFailed(now, plan.step, plan.num_rows, reason))
        self._deliver()

    # Leaps: many steps in one go, for simulated requests

    def num_steps_ahead(self) -> int:
        """How many next steps are sure to decode one token of each running row, and to do nothing else.

        0 while a step is in flight, if a row has more to compute or a sample waits that could be admitted, and where
        tokens are real. The last of the steps is the first in which a sample ends, or the last for which there are
        blocks. O(running).
        """
        rows = self._running.rows
        if not self._all_decode or not len(rows) or (self._admission.is_open and len(self._queue)):
            return 0
        num_left = int(np.minimum.reduce(self._running.max_tokens[rows] - self._memory.sequences.num_known[rows]))
        return self._memory.num_affordable_steps(rows, num_left)

    def leap(self, num_steps: int, now: float) -> tuple[StepEvents, Int64s]:
        """Take `num_steps` steps at once, 1 to `num_steps_ahead()` of them; the last ends at `now`.

        Every block, name and event is what as many rounds of `schedule` and `update` would have given.
        Returns the last step's events, and (num_steps,) int64: blocks in use during each step. O(running + blocks).
        """
        if self.in_flight is not None:
            raise StalePlanError(f"step {self.in_flight.step} is in flight: update it or fail it first")
        rows = self._running.rows.copy()
        used = self._memory.append_steps(rows, num_steps).cumsum()
        used += self._memory.pool.num_used - used[-1]
        self._step += num_steps
        return self._collect(rows, rows, None, now), used

    # Looking

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting, running or swapped out. O(1)."""
        return bool(self._live)

    @property
    def num_running(self) -> int:
        """Samples that hold a seat. O(1)."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Samples that wait for a seat, swapped ones included. O(1)."""
        return len(self._queue)

    @property
    def running_rows(self) -> Rows:
        """(n,) int64, rows that hold a seat, in order of admission; a view, stale after the next call."""
        return self._running.rows

    @property
    def block_tables(self) -> Int32s:
        """(rows, width) int32: the block table of every row; a view, stale once the table has grown."""
        return self._memory.sequences.block_tables

    def check_invariants(self) -> None:
        """Recount seats, queue and memory. Raises InvariantViolation. O(blocks + requests)."""
        samples = (sample for group in self._live.values() for sample in group)
        check_samples(samples, self.config, self._queue, self._running, self._memory)
        self.manager.check_invariants()

    # How a step is planned

    def _plan_running(self, now: float) -> tuple[Rows, Int64s, Int64s, BlockCopies]:
        """Give the running rows their tokens and blocks, preempting until the blocks suffice."""
        table = self._memory.sequences
        while True:
            rows = self._running.rows
            if not len(rows):
                return NO_ROWS, NO_ROWS, NO_ROWS, NO_COPIES
            starts = table.num_computed[rows]
            num_tokens = table.num_known[rows] - starts
            num_wanted = int(np.add.reduce(num_tokens))
            if num_wanted == len(rows):
                copies = self._memory.try_append_single(rows, starts)
            else:
                # Something more than a decode is under way, so the blocks that it names may let a waiting request in.
                self._admission.is_open = True
                if num_wanted > self.config.max_num_batched_tokens or self.config.long_prefill_tokens is not None:
                    rows, starts, num_tokens = self._share_budget(rows, starts, num_tokens)
                copies = self._memory.try_append(rows, num_tokens)
            if copies is not None:
                return rows.copy(), starts, num_tokens, copies
            num_needed = int(self._memory.num_blocks_to_append(rows, num_tokens).sum())
            self._shortage.preempt(num_needed, now=now, step=self._step)
            self._admission.is_open = True

    def _share_budget(self, rows: Rows, starts: Int64s, wanted: Int64s) -> tuple[Rows, Int64s, Int64s]:
        """Cut what the rows want to compute to the token budget, in order, and to the cap for long prompts."""
        cap = self.config.long_prefill_tokens
        if cap is not None and np.count_nonzero(wanted > 1) + len(self._queue) > 1:
            wanted = np.minimum(wanted, cap)
        before = wanted.cumsum() - wanted
        shared = (self.config.max_num_batched_tokens - before).clip(0, wanted)
        if shared.all():
            return rows, starts, shared
        gets_some = shared > 0
        return rows[gets_some], starts[gets_some], shared[gets_some]

    def _admit(self, rows: Rows, starts: Int64s, num_tokens: Int64s, now: float) -> Grants:
        table = self._memory.sequences
        num_planned = int(np.add.reduce(num_tokens))
        num_promised = num_prefilling = 0
        if num_planned > len(rows):
            known = table.num_known[rows]
            num_promised = int(np.add.reduce(-(-known // table.block_size) - table.num_blocks[rows]))
            num_prefilling = int(np.count_nonzero(known > starts + num_tokens))
        budget = self.config.max_num_batched_tokens - num_planned
        return self._admission.admit(budget, num_promised, num_prefilling, now=now, step=self._step)

    def _choose_sampling(self, rows: Rows, stops: Int64s) -> tuple[Rows, Int64s]:
        """Rows that need a token: those that catch up with what is known and are not at their end. Forks samples."""
        known = self._memory.sequences.num_known[rows]
        caught_up = stops == known
        if self._kinds.num_prefill_only:
            caught_up &= known < self._running.max_tokens[rows]
        sources = caught_up.nonzero()[0]
        sampling_rows = rows[sources]
        unforked = self._running.unforked
        if unforked:
            for source, row in zip(sources.tolist(), sampling_rows.tolist(), strict=True):
                if row in unforked:
                    siblings = self._fork(unforked[row])
                    sampling_rows = np.concatenate((sampling_rows, siblings))
                    sources = np.concatenate((sources, np.full(len(siblings), source)))
        return sampling_rows, sources

    def _admitted_seats(self) -> tuple[Seat, ...]:
        """Rows that begin or come back in this step, or did so in one that failed."""
        if not self._grants.rows and not self._forked and not self._unannounced:
            return ()
        samples = [self._running.samples[row] for row in self._grants.rows] + [sibling for _, sibling in self._forked]
        again = [sample for sample in self._unannounced if sample.state is SampleState.RUNNING]
        self._unannounced = []
        return tuple(Seat(sample.row, sample.request.request_id, sample.sample_idx) for sample in again + samples)

    def _fork(self, sample: Sample) -> Rows:
        """The prompt of a request with several samples is computed in this step: give each of the others a row."""
        rows = []
        num_samples = sample.num_samples
        self._running.mark_forked(sample)
        for sample_idx in range(1, num_samples):
            row = self._memory.fork(sample.row)
            sibling = sample.fork(sample_idx, row, self._memory.sequences.content(row))
            self._live[sample.request.request_id].append(sibling)
            self._running.add(sibling, protected_until=0)
            self._kinds.add(sibling)
            self._forked.append((sample, sibling))
            rows.append(row)
        return np.array(rows, np.int64)

    # How a step ends

    def _collect(self, computed_rows: Rows, rows: Rows, tokens: Int32s | None, now: float) -> StepEvents:
        """End the samples that have all their tokens, or a stop token; tell what came of the step."""
        samples = self._running.samples[rows]
        finished = at_length(self._memory, self._running, rows)
        if self._kinds.num_with_stops and tokens is not None:
            stopped = at_stop_token(self._running, rows, tokens)
            finished = stopped + [entry for entry in finished if not any(entry[0] is sample for sample, _ in stopped)]
        if self._kinds.num_prefill_only:
            finished += prefilled(self._memory, self._running, computed_rows)
        step = self._step - 1
        for sample, reason in finished:
            num_output = int(self._memory.sequences.num_known[sample.row]) - sample.num_prompt
            self._end(sample)
            request_id, idx = sample.request.request_id, sample.sample_idx
            self._events.append(Finished(now, step, request_id, idx, reason, num_output, sample.num_preemptions))
        self._deliver()
        return StepEvents(step, rows, tokens, samples, tuple(finished))

    def _end(self, sample: Sample) -> None:
        self._leave(sample)
        sample.state = SampleState.FINISHED
        self._kinds.remove(sample)
        samples = self._live[sample.request.request_id]
        samples.remove(sample)
        if not samples:
            del self._live[sample.request.request_id]

    def _leave(self, sample: Sample) -> None:
        """Give up the seats and the row of a running sample."""
        self._running.remove(sample)
        self._memory.close(sample.row)
        sample.row = -1
        self._admission.is_open = True

    def _undo_fork(self, first: Sample, sibling: Sample) -> None:
        if sibling.state is SampleState.RUNNING:
            self._end(sibling)
        if first.state is SampleState.RUNNING and first.row not in self._running.unforked:
            self._running.mark_unforked(first)

    def _deliver(self) -> None:
        """Hand the events of this call to the sink."""
        if self._events:
            events, self._events[:] = self._events.copy(), []
            if self._sink is not None:
                for event in events:
                    self._sink.emit(event)

    # Checks before anything changes

    def _check_in_flight(self, plan: StepPlan) -> None:
        if plan is not self.in_flight:
            raise StalePlanError(f"step {plan.step} is not in flight: it was updated, or belongs to another scheduler")

    def _check_outcome(self, plan: StepPlan, token_ids: Sequence[int] | Int32s | None) -> Int32s | None:
        self._check_in_flight(plan)
        if token_ids is None:
            if self._kinds.num_with_tokens and len(plan.sampling_rows):
                raise InvalidArgumentError("token_ids may be None only while every prompt is simulated")
            return None
        return plan.check_tokens(token_ids)

    def _close_plan(self, plan: StepPlan) -> bool:
        """The plan is no longer in flight; returns whether samples of it were ended from outside."""
        plan.inputs.is_stale = True
        self.in_flight = None
        any_left = self._num_left_in_flight > 0
        self._num_left_in_flight = 0
        return any_left
