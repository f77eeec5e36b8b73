"""The engine's loop: plan a step, carry it out on tensors, sample, tell the scheduler and the callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.arrays import Int32s, Rows
from pagedkv.engine.errors import ModelStepError
from pagedkv.engine.live_requests import LiveRequest, LiveSample, OnFinish, OnPiece
from pagedkv.engine.metrics import MetricsSnapshot
from pagedkv.engine.model import PagedModel
from pagedkv.engine.observers import Observers
from pagedkv.engine.recovery import rows_that_raise
from pagedkv.engine.row_columns import RowColumns
from pagedkv.engine.sampling import Sampled, Sampler, seed_for
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.engine.timeline import StepTimes
from pagedkv.errors import DuplicateIdError, InvalidArgumentError
from pagedkv.scheduler import Request, Scheduler, Seat, StepEvents, StepOutcome, StepPlan
from pagedkv.scheduler.events import Admitted
from pagedkv.storage import KVStorage

__all__ = ["Engine"]

NO_TOKENS = np.empty(0, np.int32)
NOTHING_SAMPLED = Sampled(NO_TOKENS, None, {})


class Engine:
    """Continuous batching of requests over one model: `add` them, then `step` while there is work.

    It owns the clock and the tensors; the scheduler decides. A step costs a fixed number of array operations for all
    samples that nobody listens to, and Python-level work for those that stream, have stop strings or want logprobs.

    An error in one request's sampling ends that request. If the model raises, the step is tried once more; if it raises
    again, the requests for which it raises alone are ended with ModelStepError, and the others go on. One thread at a time.
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
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.storage = storage
        self.tokenizer = tokenizer
        self._observers = observers
        observers.on_admitted = self._note_admission
        observers.watch(scheduler)
        self.end_token_ids = tuple(end_token_ids)
        self._sampler = Sampler(model.vocab_size)
        self._seeds = np.random.default_rng(seed)
        self._clock = clock
        self._requests: dict[str, LiveRequest] = {}
        self._rows = RowColumns()
        self._has_failed = False
        """Whether the last step failed."""

    # Requests

    def add(
        self,
        request_id: str,
        prompt_token_ids: Int32s,
        params: SamplingParams,
        *,
        on_finish: OnFinish,
        on_piece: OnPiece | None = None,
        prompt: str | None = None,
        priority: float = 0.0,
        salt: bytes = b"",
    ) -> None:
        """Queue a request. Callbacks come from within `step` and `abort`.

        Raises DuplicateIdError, InvalidArgumentError, and RequestTooLargeError if it can never fit.
        """
        if request_id in self._requests:
            raise DuplicateIdError(f"request {request_id!r} is live already")
        if params.stop and self.tokenizer is None:
            raise InvalidArgumentError("stop strings need a tokenizer: give LLM one, or use stop_token_ids")
        now = self._clock()
        live = LiveRequest(
            request_id,
            prompt_token_ids,
            params,
            seed=int(self._seeds.integers(2**63)) if params.seed is None else params.seed,
            arrival_s=now,
            prompt=prompt,
            on_piece=on_piece,
            on_finish=on_finish,
        )
        request = Request(
            request_id,
            prompt_token_ids,
            params.max_tokens,
            priority=priority,
            salt=salt,
            stop_token_ids=self._ends_of(params),
            n=params.n,
        )
        self.scheduler.add(request, now)
        self._observers.on_request(request, now)
        self._requests[request_id] = live

    def abort(self, request_id: str, error: Exception | None = None) -> None:
        """End a request now; what it produced so far is its output. Raises UnknownIdError."""
        now = self._clock()
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

    def close(self) -> None:
        """Abort every live request and complete the files that are being written."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._observers.close()

    def metrics(self) -> MetricsSnapshot:
        """Counters, gauges and histograms as they are now. From any thread. O(buckets)."""
        return self._observers.metrics.snapshot()

    # A step

    def step(self) -> None:
        """Plan one step, carry it out, and tell what came of it."""
        start = self._clock()
        plan = self.scheduler.schedule(start)
        self._observers.on_schedule(plan)
        scheduled = self._clock()
        try:
            self._seat(plan.admitted)
            self.storage.apply(plan)
            logits = self._forward(plan)
            computed = self._clock()
            sampled = self._sample(plan, logits, computed)
        except Exception as error:  # noqa: BLE001 - a model may raise anything; it must not take other requests along
            self._recover(plan, error)
            return
        except BaseException:
            self.scheduler.fail(plan, self._clock(), "interrupted")
            raise
        self._has_failed = False
        self._end_unsampled(plan.sampling_rows, sampled)
        touched, stopped = self._tell(plan.sampling_rows, sampled)
        chosen = self._clock()
        outcome = sampled.token_ids if stopped is None else StepOutcome(sampled.token_ids, stopped=stopped)
        events = self.scheduler.update(plan, outcome, chosen)
        self._sampler.accept(plan.sampling_rows, sampled.token_ids)
        self._collect(events, touched, chosen)
        self._observers.on_step(plan, events, StepTimes(start, scheduled, computed, chosen, self._clock()))

    def _forward(self, plan: StepPlan) -> Tensor | None:
        """Compute the step's tokens; None for a step that computes nothing."""
        if not plan.num_rows:
            return None
        tables = self.scheduler.block_tables
        return self.model.forward(StepInputs.of_plan(plan, tables, self.model.block_size, self.model.device))

    def _sample(self, plan: StepPlan, logits: Tensor | None, now: float) -> Sampled:
        """Choose the next tokens. Changes nothing that a second try would not set again."""
        rows = plan.sampling_rows
        if logits is None or not len(rows):
            return NOTHING_SAMPLED
        num_outputs = plan.seq_lens[plan.sampling_sources] - self._rows.num_prompt[rows]
        sampled = self._sampler.sample(logits, rows, num_outputs)
        for row in rows[num_outputs == 0].tolist():
            self._rows.samples[row].first_token_s = now
        return sampled

    def _end_unsampled(self, rows: Rows, sampled: Sampled) -> None:
        """End the requests for which no token could be chosen."""
        for idx, error in sampled.errors.items():
            request_id = self._rows.samples[rows[idx]].request.request_id
            if request_id in self._requests:
                self.abort(request_id, error)

    def _tell(self, rows: Rows, sampled: Sampled) -> tuple[list[LiveSample], NDArray[np.bool_] | None]:
        """Push the new tokens to the samples that listen.

        Returns these, and (s,) bool which sampling rows a stop string ended, None if it ended none.
        """
        touched, stopped = [], None
        for idx in np.flatnonzero(self._rows.listens[rows]).tolist():
            sample: LiveSample = self._rows.samples[rows[idx]]
            if sample.has_finished:
                continue
            touched.append(sample)
            logprobs = None if sampled.logprobs is None else sampled.logprobs[idx]
            if sample.push(int(sampled.token_ids[idx]), logprobs):
                stopped = np.zeros(len(rows), np.bool_) if stopped is None else stopped
                stopped[idx] = True
        return touched, stopped

    # What comes of it

    def _collect(self, events: StepEvents, touched: list[LiveSample], now: float) -> None:
        """Build the outputs of samples that ended, then hand out pieces."""
        for ended, reason in events.finished:
            live = self._requests[ended.request.request_id]
            sample = live.samples.get(ended.sample_idx)
            if sample is None:  # It computed its prompt only, and was never seated to sample.
                sample = self._new_sample(live, ended.sample_idx)
            sample.num_preemptions = ended.num_preemptions
            self._finish_sample(sample, ended.output_token_ids, reason, now)
        for sample in touched:
            if sample.request.on_piece is not None and not sample.has_finished:
                sample.request.on_piece(sample.take_piece())

    def _finish_sample(self, sample: LiveSample, token_ids: Int32s, reason: str, now: float) -> None:
        live = sample.request
        completion = live.completions[sample.index] = sample.finish(token_ids, reason)
        self._observers.on_finish(sample, completion, now)
        if live.on_piece is not None:
            live.on_piece(replace(sample.take_piece(), finish_reason=reason, stop=completion.stop))
        if len(live.completions) == live.num_samples:
            del self._requests[live.request_id]
            live.on_finish(live.output(now))

    def _note_admission(self, event: Admitted) -> None:
        live = self._requests[event.request_id]
        live.admitted_s = event.time
        live.num_cached_tokens = event.num_hit_tokens

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        """The step was not carried out: plan it again, or, if that was tried already, without the requests to blame."""
        guilty: dict[int, Exception] = {}
        if self._has_failed:
            guilty = rows_that_raise(self.model, self.scheduler, plan) or {int(plan.rows[-1]): error}
        self._has_failed = not guilty
        self.scheduler.fail(plan, self._clock(), f"{type(error).__name__}: {error}")
        for row, cause in guilty.items():
            request_id = self._rows.samples[row].request.request_id
            if request_id in self._requests:
                failure = ModelStepError(f"the model raised {type(cause).__name__} in request {request_id!r}: {cause}")
                failure.__cause__ = cause
                self.abort(request_id, failure)

    # Rows

    def _seat(self, seats: Iterable[Seat]) -> None:
        for row, request_id, sample_idx in seats:
            live = self._requests[request_id]
            sample = live.samples.get(sample_idx) or self._new_sample(live, sample_idx)
            self._rows.seat(row, sample)
            params = live.params
            self._sampler.seat(
                row,
                params,
                seed=seed_for(live.seed, sample_idx),
                num_prompt=len(live.prompt_token_ids),
                known_token_ids=self._known_tokens(row) if params.needs_history else NO_TOKENS,
                end_token_ids=self._ends_of(params),
            )

    def _known_tokens(self, row: int) -> Int32s:
        memory = self.scheduler.manager.memory
        rows = np.array([row])
        return memory.token_ids(rows, np.zeros(1, np.int64), memory.sequences.num_known[rows])

    def _new_sample(self, live: LiveRequest, index: int) -> LiveSample:
        sample = LiveSample(live, index, self.tokenizer, frozenset(self._ends_of(live.params)))
        live.samples[index] = sample
        return sample

    def _ends_of(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a sample of these parameters."""
        own = () if params.ignore_eos else self.end_token_ids
        return (*own, *params.stop_token_ids)
