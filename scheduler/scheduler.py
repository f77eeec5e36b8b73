"""The scheduler: who runs in the next step, with how many tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from pagedkv.arrays import MAX_TOKENS, Int32s, Int64s, Rows, as_int, as_time, shown
from pagedkv.config import require_kind, require_object
from pagedkv.errors import ConfigError, DuplicateIdError, InvalidArgumentError, StalePlanError, UnknownIdError
from pagedkv.manager import KVCacheManager
from pagedkv.scheduler.admission import Admission
from pagedkv.scheduler.client_shares import ClientShares
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.drafts import DraftCounters, Drafting
from pagedkv.scheduler.ending import ended_samples
from pagedkv.scheduler.events import Aborted, Added, Deferred, Event, EventSink, Finished, Refused, StepFailed
from pagedkv.scheduler.kinds import LiveKinds
from pagedkv.scheduler.order import FCFS, LowestPriority, QueuePolicy, VictimPolicy
from pagedkv.scheduler.outcome import NewTokens, StepOutcome, checked_outcome
from pagedkv.scheduler.plan import StepPlan
from pagedkv.scheduler.planning import StepPlanner
from pagedkv.scheduler.preemption import Cheaper, PreemptionPolicy, Recompute, Swap
from pagedkv.scheduler.recount import check_samples
from pagedkv.scheduler.refusal import QueueFullError, RequestTooLargeError, reason_to_refuse
from pagedkv.scheduler.request import Request
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.sampling import Sampling
from pagedkv.scheduler.shortage import Shortage
from pagedkv.scheduler.step_events import StepEvents
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["Scheduler"]

CHANGING_VERBS = ("add", "abort", "schedule", "update", "fail", "leap")


class Scheduler:
    """Continuous batching over one memory: `add` requests, then `schedule`, compute, `update`, again and again.

    A request has `num_known` tokens, of which `num_computed` have their K/V; a step plans how far each row catches up
    under one token budget. There is no prefill phase and no decode phase. Running rows come first, in order of admission,
    those that want a single token before the others; then waiting requests, in the queue policy's order. When blocks run
    short for the running rows, victims lose their seat one at a time until there are enough. Nothing here reads a clock;
    `now` only orders events and ages priorities.

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
        require_kind("config", config, SchedulerConfig)
        require_kind("manager", manager, KVCacheManager)
        for name, part, verb, example in (
            ("policy", policy, "rank", "Priority()"),
            ("victim", victim, "choose", "LowestPriority()"),
            ("preemption", preemption, "choose", "Swap()"),
            ("sink", sink, "emit", "EventLog(file)"),
        ):
            if part is not None:
                require_object(name, part, verb, example)
        if isinstance(preemption, Swap | Cheaper) and not manager.config.num_host_blocks:
            raise ConfigError(
                f"preemption {type(preemption).__name__} has no host blocks to move to: give num_host_blocks, or use Recompute()"
            )
        self.config = config
        self.manager = manager
        self._memory = manager.memory
        self.policy = FCFS() if policy is None else policy
        self.victim = LowestPriority() if victim is None else victim
        self.preemption = Recompute() if preemption is None else preemption
        self._sink = sink
        self._events: deque[Event] = deque()
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
        self._shares = ClientShares(config, num_blocks=manager.config.num_blocks, block_size=self._memory.block_size)
        self._live: dict[str, list[Sample]] = {}
        self._kinds = LiveKinds()
        self._sampling = Sampling(self._memory, self._running, self._live, self._kinds)
        self._drafting = Drafting(config, self._memory, self._running)
        self._planner = StepPlanner(
            config,
            self._memory,
            self._queue,
            self._running,
            admission=self._admission,
            shortage=self._shortage,
            sampling=self._sampling,
            drafting=self._drafting,
        )
        self.in_flight: StepPlan | None = None
        """The plan that awaits `update` or `fail`."""
        self._all_decode = False
        """Whether every running row has exactly its last token left to compute."""
        self._step = 0
        self._num_added = self._num_entered = 0
        # Rows of samples that were ended from outside while the step in flight may write their blocks.
        self._left_in_flight: list[int] = []
        if manager.checks is not None:
            manager.checks.watch(self, CHANGING_VERBS, self.check_invariants)

    # Requests

    def add(self, request: Request, now: float) -> None:
        """Put a request into the waiting queue. O(prompt + log waiting); its prompt is hashed when it is first considered.

        A request for which its client's share has no room now stands back until it has.

        Raises DuplicateIdError, InvalidArgumentError, RequestTooLargeError with the arithmetic if it can never fit, and
        QueueFullError if as many wait as may.
        """
        now = as_time(now)
        request_id = request.request_id
        if request_id in self._live:
            raise DuplicateIdError(f"request {shown(request_id)} is live already")
        content, num_prompt = self.manager.make_content(
            request.prompt, salt=request.salt, adapter=request.adapter, extras=request.extras
        )
        reason = reason_to_refuse(
            request,
            num_prompt,
            self.config,
            num_blocks=self._memory.pool.num_blocks,
            block_size=self._memory.block_size,
            shares=self._shares,
        )
        if reason:
            self._refuse(request_id, reason, now)
            raise RequestTooLargeError(f"request {shown(request_id)} can never run: {reason}")
        reason = self._shares.reason_to_turn_away(request.client, self.num_waiting)
        if reason:
            self._refuse(request_id, reason, now)
            raise QueueFullError(f"request {shown(request_id)} may not wait: {reason}")
        self._num_added += 1
        sample = Sample(request, content, num_prompt, rank=self.policy.rank(request, now), serial=self._num_added)
        self._live[request_id] = [sample]
        self._kinds.add(sample)
        self._events.append(Added(now, request_id, num_prompt, request.max_new_tokens, request.n))
        if self._shares.try_enter(sample):
            self._enqueue(sample)
        else:
            step = self._step if self.in_flight is None else self.in_flight.step
            self._events.append(Deferred(now, step, request_id, "its client's share is taken"))
        self._deliver()

    def abort(self, request_id: str, now: float) -> None:
        """End a request in whatever state it is, and let go of all it holds. O(log waiting + its blocks).

        Blocks that a step in flight may yet write or copy are let go of when that step is updated or failed.
        """
        now = as_time(now)
        samples = self._live.pop(request_id, None) if isinstance(request_id, str) else None
        if samples is None:
            raise UnknownIdError(f"no live request {shown(request_id)}")
        stood_back = self._shares.try_withdraw(samples[0])
        for sample in samples:
            state = sample.state
            if state is SampleState.RUNNING:
                self._leave(sample)
            elif not stood_back:
                self._queue.remove(sample)
                if state is SampleState.SWAPPED:
                    self._close_row(sample)
            sample.state = SampleState.FINISHED
            self._kinds.remove(sample)
            self._events.append(Aborted(now, request_id, state.value))
        if not stood_back:
            self._let_enter(samples[0])
        self._admission.is_open = True
        self._deliver()

    def _refuse(self, request_id: str, reason: str, now: float) -> None:
        self._events.append(Refused(now, request_id, reason))
        self._deliver()

    def _enqueue(self, sample: Sample) -> None:
        """It enters the queue, behind those of its rank that entered before."""
        self._num_entered += 1
        sample.place = (sample.place[0], self._num_entered, 0)
        self._queue.push(sample)
        self._admission.is_open = True

    def _let_enter(self, sample: Sample) -> None:
        """The request of this sample is over: others of its client may enter."""
        for other in self._shares.leave(sample):
            self._enqueue(other)

    # Steps

    def schedule(self, now: float, drafts: Mapping[int, Sequence[int] | Int32s] | None = None) -> StepPlan:
        """Plan the next step; it may be empty. Carry it out, then call `update` or `fail`. O(running) array operations.

        `drafts` are guesses at the next tokens of running rows, for which they take what room the step leaves over:
        `plan.num_drafts` says how many each row has. Rows with more to compute than their last token get none, nor does
        any row in a step that preempts; where blocks are short, each row gets what fits.

        Raises StalePlanError, InvalidArgumentError, UnknownIdError for drafts of a row that does not run, and
        BlockStateError within a step of the manager; nothing changes then. Whatever else is raised while the step is
        planned, by a policy or for want of memory, the step counts as failed: what it gave is taken back, preempted
        requests wait, and the next call plans anew.
        """
        now = as_time(now)
        if self.in_flight is not None:
            raise StalePlanError(f"step {self.in_flight.step} is in flight: update it or fail it first")
        guesses = None if drafts is None else self._drafting.check(drafts)
        self._all_decode = False
        self._planner.begin_step()
        try:
            plan = self._planner.plan(guesses, now=now, step=self._step)
        except BaseException as error:
            reason = f"planning raised {type(error).__name__}"
            self._take_back(self._planner.seated_rows(), now, reason, step=self._step)
            self._step += 1
            raise
        self._step += 1
        self.in_flight = plan
        self._deliver()
        return plan

    def update(self, plan: StepPlan, outcome: StepOutcome | Sequence[int] | Int32s | None, now: float) -> StepEvents:
        """Take the tokens sampled for `plan.sampling_rows`, in that order; None if all prompts are simulated.

        Plain tokens are one for each row; a StepOutcome tells of several for a row, and of rows that the engine ends.
        O(sampled) array operations; Python-level work only for rows that fill a block or end, or that get what may be a
        stop token of some live sample.
        Raises StalePlanError for a plan that is not in flight, InvalidArgumentError for wrong tokens; nothing changes then.
        """
        now = as_time(now)
        self._check_in_flight(plan)
        new = checked_outcome(plan, outcome, needs_token_ids=self._kinds.num_with_tokens > 0)
        ended = self._close_plan(plan)
        if ended:
            new = new.only(self._running.samples[new.rows] != None)  # noqa: E711 - elementwise
        self._memory.end_step()
        if new.num_tokens is None:
            self._memory.tokens.extend(new.rows, new.token_ids)
        else:
            new = self._drafting.settle(new, cuts_at_stops=self._kinds.num_with_stops > 0)
        self._all_decode = (
            not self._kinds.num_with_tokens
            and len(plan.sampling_rows) == len(plan.rows) == len(self._running) > 0
            and not ended
            and self._memory.leaps.are_possible
        )
        return self._collect(plan.rows, new, now)

    def fail(self, plan: StepPlan, now: float, reason: str = "") -> None:
        """The step was not carried out: take back what it planned, so that its rows are planned again. O(rows + blocks).

        Names that the step gave are forgotten, slots taken back; samples whose blocks were to be moved by the step start
        over from what is sure to be on the device.
        """
        now = as_time(now)
        self._check_in_flight(plan)
        self._close_plan(plan)
        self._take_back([seat.row for seat in plan.admitted], now, reason, step=plan.step)
        self._deliver()

    # Leaps: many steps in one go, for simulated requests

    def num_steps_ahead(self) -> int:
        """How many next steps are sure to decode one token of each running row, and to do nothing else.

        0 while a step is in flight, if a row has more to compute or a sample waits that could be admitted, and where
        tokens are real. The last of the steps is the first in which a sample ends, the last for which there are
        blocks, or the last before those that wait may be admitted. O(running).
        """
        rows = self._running.rows
        if not self._all_decode or not len(rows):
            return 0
        num_left = int(np.minimum.reduce(self._running.max_tokens[rows] - self._memory.sequences.num_known[rows]))
        if self._admission.is_open and len(self._queue):
            num_left = min(num_left, self._planner.num_steps_closed(self._step))
            if not num_left:
                return 0
        return self._memory.leaps.num_affordable(rows, num_left)

    def leap(self, num_steps: int, now: float) -> tuple[StepEvents, Int64s]:
        """Take `num_steps` steps at once, 1 to what `num_steps_ahead()` said; the last ends at `now`.

        Every block, name and event is what as many rounds of `schedule` and `update` would have given.
        Returns the last step's events, and (num_steps,) int64: blocks in use during each step. O(running + blocks).
        Raises StalePlanError while a step is in flight. More steps than were sure to come are not noticed.
        """
        if self.in_flight is not None:
            raise StalePlanError(f"step {self.in_flight.step} is in flight: update it or fail it first")
        now = as_time(now)
        num_steps = as_int("num_steps", num_steps, at_least=1, at_most=MAX_TOKENS)
        rows = self._running.rows.copy()
        used = self._memory.leaps.append(rows, num_steps).cumsum()
        used += self._memory.pool.num_used - used[-1]
        self._step += num_steps
        return self._collect(rows, NewTokens(rows, None), now), used

    # Looking

    @property
    def has_begun(self) -> bool:
        """Whether it has taken a request or planned a step. O(1)."""
        return self._num_added > 0 or self._step > 0

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting, running or swapped out. O(1)."""
        return bool(self._live)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id is live: waiting, running or swapped out. O(1)."""
        return isinstance(request_id, str) and request_id in self._live

    @property
    def num_running(self) -> int:
        """Samples that hold a seat. O(1)."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Samples that wait for a seat, swapped ones and those that stand back included. O(1)."""
        return len(self._queue) + self._shares.num_standing

    @property
    def draft_counters(self) -> DraftCounters:
        """How many drafts were computed, and how many came true, so far; counts on as steps are updated."""
        return self._drafting.counters

    @property
    def running_rows(self) -> Rows:
        """(n,) int64, rows that hold a seat, in order of admission; a view, stale after the next call."""
        return self._running.rows

    @property
    def block_tables(self) -> Int32s:
        """(rows, width) int32: the block table of every row; a view, stale once the table has grown."""
        return self._memory.sequences.block_tables

    def outputs(self, request_id: str) -> dict[int, Int32s]:
        """New tokens so far of each live sample of a request, by sample index. O(tokens). Raises UnknownIdError.

        A sample that ended is not among them: its tokens are with it, in the events of the update that ended it.
        """
        samples = self._live.get(request_id) if isinstance(request_id, str) else None
        if samples is None:
            raise UnknownIdError(f"no live request {shown(request_id)}")
        for sample in samples:
            if sample.row >= 0:
                self._memory.tokens.sync(sample.row)
        return {sample.sample_idx: sample.output_token_ids for sample in samples}

    def check_invariants(self) -> None:
        """Recount seats, queue and memory. Raises InvariantViolation. O(blocks + requests)."""
        check_samples(
            self._live.values(), self.config, self._queue, self._running, memory=self._memory, shares=self._shares
        )
        self.manager.check_invariants()

    # How a step ends

    def _collect(self, computed_rows: Rows, new: NewTokens, now: float) -> StepEvents:
        """End the samples that have all their tokens, or a stop; tell what came of the step."""
        seated = self._running.lend_samples()
        finished = ended_samples(self._memory, self._running, self._kinds, computed_rows=computed_rows, new=new)
        step = self._step - 1
        for sample, reason in finished:
            sample.num_known = int(self._memory.sequences.num_known[sample.row])
            num_output = sample.num_known - sample.num_prompt
            self._end(sample)
            request_id, idx = sample.request.request_id, sample.sample_idx
            self._events.append(Finished(now, step, request_id, idx, reason, num_output, sample.num_preemptions))
        self._deliver()
        return StepEvents(step, new.rows, new.token_ids, seated, tuple(finished), new.num_tokens)

    def _end(self, sample: Sample) -> None:
        self._leave(sample)
        sample.state = SampleState.FINISHED
        self._kinds.remove(sample)
        samples = self._live[sample.request.request_id]
        samples.remove(sample)
        if not samples:
            del self._live[sample.request.request_id]
            self._let_enter(sample)

    def _leave(self, sample: Sample) -> None:
        """Give up the seats and the row of a running sample."""
        self._running.remove(sample)
        self._close_row(sample)
        self._admission.is_open = True

    def _close_row(self, sample: Sample) -> None:
        """Give the sample's row back: at once, or when the step in flight is over."""
        if self.in_flight is None:
            self._memory.close(sample.row)
        else:
            self._left_in_flight.append(sample.row)
        sample.row = -1

    def _take_back(self, seated_rows: list[int], now: float, reason: str, *, step: int) -> None:
        """The step was not carried out, or not even planned to the end: its rows are planned again; those seated stay so."""
        for first, sibling in self._sampling.forked:
            self._undo_fork(first, sibling)
        num_rows = self._planner.take_back(seated_rows)
        self._admission.is_open = True
        self._events.append(StepFailed(now, step, num_rows, reason))

    def _undo_fork(self, first: Sample, sibling: Sample) -> None:
        if sibling.state is SampleState.RUNNING:
            self._end(sibling)
        if first.state is SampleState.RUNNING and first.row not in self._running.unforked:
            self._running.mark_unforked(first)

    def _deliver(self) -> None:
        """Hand the events of this call to the sink, each once: after one at which it raises, the rest wait for the next call.

        One by one, so that what a sink brings about by calling the scheduler is told after what happened before.
        """
        events, sink = self._events, self._sink
        while events:
            event = events.popleft()
            if sink is not None:
                sink.emit(event)

    # Checks before anything changes

    def _check_in_flight(self, plan: StepPlan) -> None:
        if not isinstance(plan, StepPlan):
            raise InvalidArgumentError(f"expected the plan in flight, found {type(plan).__name__}")
        if plan is not self.in_flight:
            raise StalePlanError(f"step {plan.step} is not in flight: it was updated, or belongs to another scheduler")

    def _close_plan(self, plan: StepPlan) -> bool:
        """The plan is no longer in flight; returns whether samples of it were ended from outside."""
        plan.inputs.is_stale = True
        self.in_flight = None
        left, self._left_in_flight = self._left_in_flight, []
        for row in left:
            self._memory.close(row)
        return bool(left)
