"""Record the inputs of a live scheduler, from which every decision can be made again.

A recording is JSON lines: a header with the configuration, then one line per call that did something. It holds prompts and
sampled tokens, because decisions depend on them: keep it as you keep your users' prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TextIO

import numpy as np

from pagedkv.arrays import Int32s, Rows, as_time
from pagedkv.content import SimulatedPrompt
from pagedkv.errors import InvalidArgumentError, InvariantViolation, PagedKVError
from pagedkv.manager import KVCacheManager
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.drafts import DraftCounters
from pagedkv.scheduler.order import FCFS, LatestArrival, LowestPriority, Priority
from pagedkv.scheduler.outcome import StepOutcome
from pagedkv.scheduler.plan import StepPlan
from pagedkv.scheduler.preemption import Cheaper, Recompute, Swap
from pagedkv.scheduler.request import Request
from pagedkv.scheduler.scheduler import Scheduler
from pagedkv.scheduler.step_events import StepEvents
from pagedkv.statistics import PrefixCounters

__all__ = ["Recorder", "RecordingError", "digest_of"]

VERSION = 2
POLICIES = {
    policy.__name__: policy for policy in (FCFS, Priority, LatestArrival, LowestPriority, Recompute, Swap, Cheaper)
}
ROLES = ("policy", "victim", "preemption")


class RecordingError(PagedKVError, ValueError):
    """A recording that cannot be read, or that does not lead to the plans that it recorded: line, expected, found."""


class Recorder:
    """A scheduler that writes down what is asked of it. Use it in the scheduler's place, for all but leaps.

    Recorded is what did something, and so each `add`, since a refused request is a decision; other calls unless they were
    refused, and a step that could not be planned, behind which nothing can be replayed. What a sink raises changes nothing
    of this. A call is written when it is over: what `file` raises comes when the work is done. About 70 us a step, plus the
    tokens: as much as a step of few rows itself.

    Raises InvalidArgumentError for a scheduler that was used before, or whose memory was: what came of that is not in the
    recording, and later decisions depend on it.
    """

    def __init__(self, scheduler: Scheduler, file: TextIO) -> None:
        _check_unused(scheduler)
        self.scheduler = scheduler
        self._file = file
        self._under_way: list[dict[str, Any]] = []
        self._depth = 0
        header = {
            "recording": VERSION,
            "cache": dataclasses.asdict(scheduler.manager.config),
            "eviction": scheduler.manager.memory.pool.policy.name,
            "scheduler": dataclasses.asdict(scheduler.config),
        }
        for role in ROLES:
            policy = getattr(scheduler, role)
            if type(policy) is not POLICIES.get(type(policy).__name__):
                found = type(policy).__name__
                raise InvalidArgumentError(f"a recording can only name pagedkv's own policies, found {found}")
            header[role] = {"name": type(policy).__name__, **dataclasses.asdict(policy)}
        self._write(header)

    def add(self, request: Request, now: float) -> None:
        """As Scheduler.add."""
        now = as_time(now)
        record = {"call": "add", "now": now, "request": _encode_request(request)}
        with self._recording(record):
            try:
                self.scheduler.add(request, now)
            except BaseException as error:
                record["raised"] = type(error).__name__
                raise

    def abort(self, request_id: str, now: float) -> None:
        """As Scheduler.abort."""
        now = as_time(now)
        record = {"call": "abort", "now": now, "request_id": request_id} if request_id in self.scheduler else {}
        with self._recording(record):
            self.scheduler.abort(request_id, now)

    def schedule(self, now: float, drafts: Mapping[int, Sequence[int] | Int32s] | None = None) -> StepPlan:
        """As Scheduler.schedule; the record holds the drafts, and the plan's number with a digest of it."""
        now = as_time(now)
        before = self.in_flight
        record: dict[str, Any] = {}
        with self._recording(record):
            try:
                return self.scheduler.schedule(now, drafts)
            except BaseException as error:
                is_refusal = isinstance(error, PagedKVError) and not isinstance(error, InvariantViolation)
                if self.in_flight is before and not is_refusal:
                    record |= {"call": "schedule", "now": now, "failed": type(error).__name__}
                raise
            finally:
                plan = self.in_flight
                if plan is not None and plan is not before:
                    record |= {"call": "schedule", "now": now, **_encode_drafts(drafts)}
                    record |= {"step": plan.step, "plan": digest_of(plan)}

    def update(self, plan: StepPlan, outcome: StepOutcome | Sequence[int] | Int32s | None, now: float) -> StepEvents:
        """As Scheduler.update."""
        now = as_time(now)
        with self._ending(plan, {"call": "update", "now": now, **_encode_outcome(outcome)}):
            return self.scheduler.update(plan, outcome, now)

    def fail(self, plan: StepPlan, now: float, reason: str = "") -> None:
        """As Scheduler.fail."""
        now = as_time(now)
        with self._ending(plan, {"call": "fail", "now": now, "reason": reason}):
            self.scheduler.fail(plan, now, reason)

    # Looking changes nothing, so it is not recorded

    @property
    def config(self) -> SchedulerConfig:
        """As Scheduler.config."""
        return self.scheduler.config

    @property
    def manager(self) -> KVCacheManager:
        """As Scheduler.manager."""
        return self.scheduler.manager

    @property
    def in_flight(self) -> StepPlan | None:
        """As Scheduler.in_flight."""
        return self.scheduler.in_flight

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.scheduler

    @property
    def has_work(self) -> bool:
        """As Scheduler.has_work."""
        return self.scheduler.has_work

    @property
    def num_running(self) -> int:
        """As Scheduler.num_running."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """As Scheduler.num_waiting."""
        return self.scheduler.num_waiting

    @property
    def draft_counters(self) -> DraftCounters:
        """As Scheduler.draft_counters."""
        return self.scheduler.draft_counters

    @property
    def running_rows(self) -> Rows:
        """As Scheduler.running_rows."""
        return self.scheduler.running_rows

    @property
    def block_tables(self) -> Int32s:
        """As Scheduler.block_tables."""
        return self.scheduler.block_tables

    def outputs(self, request_id: str) -> dict[int, Int32s]:
        """As Scheduler.outputs."""
        return self.scheduler.outputs(request_id)

    def check_invariants(self) -> None:
        """As Scheduler.check_invariants."""
        self.scheduler.check_invariants()

    @contextmanager
    def _recording(self, record: dict[str, Any]) -> Iterator[None]:
        """Write the record, unless it is empty, when the call is over; before those of calls that a sink made meanwhile."""
        self._under_way.append(record)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                records, self._under_way = self._under_way, []
                for each in records:
                    if each:
                        self._write(each)

    @contextmanager
    def _ending(self, plan: StepPlan, record: dict[str, Any]) -> Iterator[None]:
        """As `_recording`, unless the call is refused: for another plan than that in flight, or one that stays so."""
        was_in_flight = plan is self.in_flight
        with self._recording(record):
            try:
                yield
            finally:
                if not was_in_flight or plan is self.in_flight:
                    record.clear()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def _check_unused(scheduler: Scheduler) -> None:
    """Raise InvalidArgumentError unless neither the scheduler nor its memory has served anybody."""
    memory = scheduler.manager.memory
    memory_is_unused = memory.pool.num_free == memory.pool.num_blocks and memory.counters == PrefixCounters()
    if scheduler.has_begun or not memory_is_unused:
        raise InvalidArgumentError(
            "a recording begins with a scheduler that has taken no request and planned no step, over a memory that has "
            "held nothing: later decisions depend on what they did before"
        )


def digest_of(plan: StepPlan) -> str:
    """What a plan decides, in 16 hex digits."""
    arrays = (plan.rows, plan.num_tokens, plan.starts, plan.sampling_rows, plan.sampling_sources)
    pairs = (plan.swaps_out, plan.copies, plan.swaps_in)
    digest = sha256(b"|".join(array.astype("<i8").tobytes() for array in arrays))
    if plan.drafts is not None:
        digest.update(plan.drafts.num_tokens.astype("<i8").tobytes() + plan.drafts.token_ids.astype("<i4").tobytes())
    digest.update(b"|".join(pair.sources.tobytes() + b">" + pair.targets.tobytes() for pair in pairs))
    return digest.hexdigest()[:16]


def _encode_drafts(drafts: Mapping[int, Sequence[int] | Int32s] | None) -> dict[str, Any]:
    """The drafts of a schedule, as pairs of a row and its tokens; nothing where none were given."""
    return {} if drafts is None else {"drafts": [[int(row), _plain(tokens)] for row, tokens in drafts.items()]}


def _encode_outcome(outcome: StepOutcome | Sequence[int] | Int32s | None) -> dict[str, Any]:
    """The fields of an update; those that plain tokens have no use for are left out."""
    if not isinstance(outcome, StepOutcome):
        return {"token_ids": _plain(outcome)}
    return {
        "token_ids": _plain(outcome.token_ids),
        "num_tokens": _plain(outcome.num_tokens),
        "stopped": _plain(outcome.stopped),
    }


def _plain(values: Any) -> Any:
    """Whole numbers or booleans as JSON takes them; None for anything else, which the scheduler refuses."""
    try:
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values))
    except (TypeError, ValueError, OverflowError):
        return None
    return array.tolist() if array.dtype.kind in "iub" or not array.size else None


def _encode_request(request: Request) -> dict[str, Any]:
    prompt = request.prompt
    if isinstance(prompt, SimulatedPrompt):
        ids = np.asarray(prompt.content_ids).tolist()
        encoded: Any = {"num_tokens": prompt.num_tokens, "ids": ids, "size": prompt.content_block_size}
    else:
        encoded = _plain(prompt)
    extras = [[extra.start, extra.stop, extra.digest.hex()] for extra in request.extras]
    plain = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in ("prompt", "salt", "extras", "stop_token_ids")
    }
    stops = sorted(request.stop_token_ids)
    return {**plain, "prompt": encoded, "salt": request.salt.hex(), "extras": extras, "stop_token_ids": stops}
