"""The engine's loop: plan a step, carry it out on tensors, sample, tell the scheduler and the callers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from threading import Thread, current_thread
from typing import Any

import numpy as np
from torch import Tensor

from pagedkv.arrays import Int32s, Int64s, Rows, as_token_ids
from pagedkv.engine.errors import EngineClosedError
from pagedkv.engine.held_errors import HeldErrors
from pagedkv.engine.interrupts import interruptible, uninterrupted
from pagedkv.engine.listeners import tell_listeners
from pagedkv.engine.live_requests import LiveRequest, LiveSample, OnFinish, OnPiece
from pagedkv.engine.metrics import MetricsSnapshot
from pagedkv.engine.model import PagedModel
from pagedkv.engine.observers import Observers
from pagedkv.engine.outputs import Piece, RequestOutput
from pagedkv.engine.recovery import Recovery
from pagedkv.engine.request_limits import RequestLimits
from pagedkv.engine.row_columns import RowColumns
from pagedkv.engine.sampling import Sampled, Sampler, seed_for
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.speculation import Drafter, RowDrafts, accept_drafts, positions_of
from pagedkv.engine.step_runner import StepRunner
from pagedkv.engine.timeline import StepTimes
from pagedkv.errors import DuplicateIdError, InvalidArgumentError
from pagedkv.scheduler import Request, Scheduler, Seat, StepEvents, StepPlan
from pagedkv.scheduler.events import Admitted, Preempted
from pagedkv.storage import KVStorage

__all__ = ["Engine"]

NO_TOKENS = np.empty(0, np.int32)
NOTHING_SAMPLED = Sampled(NO_TOKENS, None, {})


class Engine:
    """Continuous batching of requests over one model: `add` them, then `step` while there is work.

    It owns the clock and the tensors; the scheduler decides. A step costs a fixed number of array operations for all
    samples that nobody listens to, and Python-level work for those that stream, have stop strings or want logprobs.

    An error in one request's sampling or text ends that request. If the model raises, the step is tried once more; if it
    raises again, the requests for which it raises alone are ended with ModelStepError, and the others go on. One thread at
    a time.
    """

    def __init__(
        self,
        model: PagedModel,
        scheduler: Scheduler,
        storage: KVStorage,
        *,
        tokenizer: Any = None,
        end_token_ids: Iterable[int] = (),
        observers: Observers,
        drafter: Drafter | None = None,
        max_length: int | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.storage = storage
        self._runner = StepRunner(model, storage, scheduler, max_length=max_length)
        self._drafts: RowDrafts | None = None
        if drafter is not None:
            self._drafts = RowDrafts(drafter, scheduler, model.vocab_size, on_error=observers.on_drafter_error)
        self.tokenizer = tokenizer
        self.limits = RequestLimits(
            scheduler, vocab_size=model.vocab_size, max_length=max_length, has_tokenizer=tokenizer is not None
        )
        self._observers = observers
        self._requests: dict[str, LiveRequest] = {}
        # Not a method: no cycle then keeps the K/V memory until the garbage collector comes by.
        observers.on_seating = partial(_note_seating, self._requests)
        observers.watch(scheduler)
        self.end_token_ids = tuple(end_token_ids)
        self._sampler = Sampler(model.vocab_size)
        self._seeds = np.random.default_rng(seed)
        self.clock = clock
        self._rows = RowColumns()
        self._recovery = Recovery(model, scheduler, self._rows)
        self._owner: Thread | None = None
        self._callbacks = HeldErrors("callbacks")
        self._news: deque[tuple[Callable[[Any], None], Piece | RequestOutput]] = deque()
        """Callbacks to be called once the books are closed, each with what it is told."""

    # Whose it is

    def take_over(self, thread: Thread) -> None:
        """From now on this thread alone may add, abort, step and close. Raises EngineClosedError if another has it."""
        self.require_owner()
        self._owner = thread

    def require_owner(self) -> None:
        """Raise EngineClosedError if a thread has taken the engine over that still runs and is not this one. O(1)."""
        owner = self._owner
        if owner is not None and owner is not current_thread() and owner.is_alive():
            raise EngineClosedError("an AsyncLLM has taken this LLM over: nobody else may use it until that is closed")

    # Requests

    @uninterrupted
    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int] | Int32s,
        params: SamplingParams,
        *,
        on_finish: OnFinish,
        on_piece: OnPiece | None = None,
        prompt: str | None = None,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
        arrival_s: float | None = None,
    ) -> None:
        """Queue a request. Callbacks come at the end of `step`, `abort` and `close`; what one raises comes out there.

        A callback may add and abort requests: the books are closed by then.

        `arrival_s` is when its user sent it, by `clock`; None: now. All latencies count from there.

        Raises DuplicateIdError, InvalidArgumentError, RequestTooLargeError if it can never fit, and QueueFullError if as many
        wait as may, of all or of its `client`.
        """
        self.require_owner()
        if request_id in self._requests:
            raise DuplicateIdError(f"request {request_id!r} is live already")
        token_ids = as_token_ids("prompt", prompt_token_ids)  # A copy: the caller may go on using its own.
        self.limits.check_prompt(token_ids, params)
        self.limits.check_params(params)
        now = self.clock()
        if arrival_s is None:
            arrival_s = now
        elif not arrival_s <= now:
            raise InvalidArgumentError(f"arrival_s {arrival_s} lies ahead: the clock says {now}")
        request = Request(
            request_id,
            token_ids,
            params.max_tokens,
            priority=priority,
            client=client,
            salt=salt,
            stop_token_ids=self._ends_of(params),
            n=params.n,
        )
        self.limits.check_priority(priority)
        self.scheduler.add(request, arrival_s)
        self._requests[request_id] = LiveRequest(
            request_id,
            token_ids,
            params,
            seed=int(self._seeds.integers(2**63)) if params.seed is None else params.seed,
            arrival_s=arrival_s,
            prompt=prompt,
            salt=salt,
            on_piece=on_piece,
            on_finish=on_finish,
        )
        self._observers.on_request(request, arrival_s)

    @uninterrupted
    def abort(self, request_id: str, error: Exception | None = None) -> None:
        """End a request now; what it produced so far is its output. Raises UnknownIdError."""
        self.require_owner()
        self._end_request(request_id, error)
        self._tell()

    def _end_request(self, request_id: str, error: Exception | None) -> None:
        now = self.clock()
        tokens = self.scheduler.outputs(request_id)
        self.scheduler.abort(request_id, now)
        live = self._requests[request_id]
        live.error = error
        reason = "abort" if error is None else "error"
        for index in range(live.num_samples):
            if index not in live.completions:
                sample = live.samples.get(index) or self._new_sample(live, index)
                self._finish_sample(sample, tokens.get(index, NO_TOKENS), reason, now)

    @property
    def has_work(self) -> bool:
        """Whether any request is live. O(1)."""
        return self.scheduler.has_work

    def is_live(self, request_id: str) -> bool:
        """Whether a request of this id is under way. O(1)."""
        return request_id in self._requests

    @uninterrupted
    def close(self) -> None:
        """Abort every live request and complete the files that are being written.

        Raises what callbacks raised, and the error with which such a file ended; everything is done by then.
        """
        self.require_owner()
        for request_id in list(self._requests):
            self._end_request(request_id, None)
        self._callbacks.call(self._observers.close)
        self._drafts = None  # The drafter is free for another engine.
        self._tell()

    def metrics(self) -> MetricsSnapshot:
        """Counters, gauges and histograms as they are now. From any thread. O(buckets)."""
        return self._observers.metrics.snapshot()

    # A step

    @uninterrupted
    def step(self) -> None:
        """Plan one step, carry it out, and tell what came of it."""
        self.require_owner()
        start = self.clock()
        plan = self.scheduler.schedule(start, None if self._drafts is None else self._drafts.guess())
        self._observers.on_schedule(plan)
        scheduled = self.clock()
        try:
            self._seat(plan.admitted)
            with interruptible():
                self._runner.apply(plan)
                logits = self._runner.compute(plan)
            computed = self.clock()
            sampled, counts, beginning = self._sample(plan, logits)
        except Exception as error:  # noqa: BLE001 - a model may raise anything; it must not take other requests along
            self._recover(plan, error)
            self._tell()
            return
        except BaseException:
            self.scheduler.fail(plan, self.clock(), "interrupted")
            raise
        self._recovery.step_succeeded()
        rows = plan.sampling_rows
        if sampled.errors:
            self._end_unsampled(plan, rows if counts is None else rows.repeat(counts), sampled)
        touched, outcome = tell_listeners(self._rows, rows, sampled, counts)
        chosen = self.clock()
        self._note_first_tokens(beginning, chosen)
        events = self.scheduler.update(plan, outcome, chosen)
        self._remember(events)
        self._collect(events, touched, chosen)
        self._observers.on_step(plan, events, StepTimes(start, scheduled, computed, chosen, self.clock()))
        self._tell()

    def _sample(self, plan: StepPlan, logits: Tensor | None) -> tuple[Sampled, Int64s | None, Rows]:
        """Choose the next tokens, packed by sampling row; how many each row got, None: one each; the rows whose first it is.

        Changes nothing that a second try would not set again.
        """
        if logits is None or not len(plan.sampling_rows):
            return NOTHING_SAMPLED, None, plan.sampling_rows
        rows, lengths = positions_of(plan)
        num_outputs = lengths - self._rows.num_prompt[rows]
        sampled = self._sampler.sample(logits, rows, num_outputs)
        beginning = rows[num_outputs == 0]
        if plan.drafts is None:
            return sampled, None, beginning
        accepted = accept_drafts(sampled.token_ids, plan.drafts.token_ids, plan.drafts.num_tokens)
        return sampled.only(accepted.kept), accepted.num_tokens, beginning

    def _note_first_tokens(self, rows: Rows, now: float) -> None:
        """These rows have their first token on the host now, but for those that are ended because there was none."""
        for row in rows.tolist():
            sample = self._rows.samples[row]
            if sample is not None:
                sample.first_token_s = now

    def _end_unsampled(self, plan: StepPlan, rows: Rows, sampled: Sampled) -> None:
        """End the requests for which no token could be chosen; `rows` are those of the tokens."""
        self._observers.on_seats(plan.admitted)
        for idx, error in sampled.errors.items():
            sample = self._rows.samples[rows[idx]]
            if sample is not None:  # Otherwise it ended with another sample of its request.
                self._end_request(sample.request.request_id, error)

    def _remember(self, events: StepEvents) -> None:
        """Let those know of the new tokens whose next ones depend on them: penalties, and the drafter."""
        if events.token_ids is None:
            return
        rows = events.rows if events.num_tokens is None else events.rows.repeat(events.num_tokens)
        self._sampler.accept(rows, events.token_ids)
        if self._drafts is not None:
            self._drafts.extend(events)

    # What comes of it

    def _collect(self, events: StepEvents, touched: list[LiveSample], now: float) -> None:
        """Build the outputs of samples that ended, and pieces, then end the requests whose text failed."""
        failed: list[LiveSample] = []
        for ended, reason in events.finished:
            live = self._requests[ended.request.request_id]
            sample = live.samples.get(ended.sample_idx)
            if sample is None:  # It computed its prompt only, and was never seated to sample.
                sample = self._new_sample(live, ended.sample_idx)
            self._finish_sample(sample, ended.output_token_ids, reason, now)
            if sample.error is not None:
                failed.append(sample)
        for sample in touched:
            if sample.has_finished:
                continue
            if sample.error is not None:
                failed.append(sample)
            elif sample.request.on_piece is not None:
                self._news.append((sample.request.on_piece, sample.take_piece()))
        for sample in failed:
            if self._requests.get(sample.request.request_id) is sample.request:
                self._end_request(sample.request.request_id, sample.error)

    def _finish_sample(self, sample: LiveSample, token_ids: Int32s, reason: str, now: float) -> None:
        live = sample.request
        self._rows.release(sample)
        completion = live.completions[sample.index] = sample.finish(token_ids, reason)
        if live.error is None:
            live.error = sample.error
        self._observers.on_finish(sample, completion, now)
        if self._drafts is not None:
            self._drafts.end((live.request_id, sample.index))
        if live.on_piece is not None:
            last = replace(sample.take_piece(), finish_reason=completion.finish_reason, stop=completion.stop)
            self._news.append((live.on_piece, last))
        if len(live.completions) == live.num_samples:
            del self._requests[live.request_id]
            output = live.output(now)
            live.samples.clear()  # They refer back to it: what its callbacks hold is not to wait for the garbage collector.
            self._news.append((live.on_finish, output))

    def _tell(self) -> None:
        """Call the callbacks, in order; one that aborts a request has the rest called first."""
        while self._news:
            callback, news = self._news.popleft()
            self._callbacks.call(callback, news)
        self._callbacks.raise_all()

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        """The step was not carried out: plan it again, or, if that was tried already, without the requests to blame."""
        guilty = self._recovery.blame(plan, error)
        self.scheduler.fail(plan, self.clock(), f"{type(error).__name__}: {error}")
        for live, failure in guilty:
            self._end_request(live.request_id, failure)

    # Rows

    def _seat(self, seats: Sequence[Seat]) -> None:
        seated: list[LiveSample] = []
        # All of them first: whoever is to blame for what is raised below is found by row.
        for row, request_id, sample_idx in seats:
            live = self._requests[request_id]
            seated.append(live.samples.get(sample_idx) or self._new_sample(live, sample_idx))
            self._rows.seat(row, seated[-1])
        for (row, _, _), sample in zip(seats, seated, strict=True):
            self._prepare(row, sample)

    def _prepare(self, row: int, sample: LiveSample) -> None:
        """Have tokens sampled, and guessed, for what this row holds now."""
        live, params = sample.request, sample.params
        self._sampler.seat(
            row,
            params,
            seed=seed_for(live.seed, sample.index),
            num_prompt=len(live.prompt_token_ids),
            known_token_ids=self._known_tokens(row) if params.needs_history else NO_TOKENS,
            end_token_ids=self._ends_of(params),
        )
        if self._drafts is not None:
            # What a penalty does to a token depends on those before it, so such samples are not guessed for.
            max_length = 0 if params.needs_history else len(live.prompt_token_ids) + params.max_tokens
            key = (live.request_id, sample.index)
            self._drafts.seat(row, key, self._known_tokens(row), max_length=max_length, salt=live.salt)

    def _known_tokens(self, row: int) -> Int32s:
        memory = self.scheduler.manager.memory
        rows = np.array([row])
        return memory.tokens.packed(rows, np.zeros(1, np.int64), memory.sequences.num_known[rows])

    def _new_sample(self, live: LiveRequest, index: int) -> LiveSample:
        sample = LiveSample(live, index, self.tokenizer, frozenset(self._ends_of(live.params)))
        live.samples[index] = sample
        return sample

    def _ends_of(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a sample of these parameters."""
        own = () if params.ignore_eos else self.end_token_ids
        return (*own, *params.stop_token_ids)


def _note_seating(requests: dict[str, LiveRequest], event: Admitted | Preempted) -> None:
    live = requests[event.request_id]
    if isinstance(event, Admitted):
        live.admitted_s = event.time
        live.num_cached_tokens = event.num_hit_tokens
    elif event.sample_idx in live.samples:
        live.samples[event.sample_idx].num_preemptions += 1
