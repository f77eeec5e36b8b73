"""Make every decision of a recording again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pagedkv.arrays import shown
from pagedkv.block_keys import CacheIdentity, ExtraKey
from pagedkv.config import CacheConfig
from pagedkv.content import SimulatedPrompt
from pagedkv.errors import InvariantViolation, PagedKVError, StalePlanError
from pagedkv.eviction import make_policy
from pagedkv.manager import KVCacheManager, Prompt
from pagedkv.scheduler.config import MAX_PREEMPTIONS, SchedulerConfig
from pagedkv.scheduler.events import EventSink
from pagedkv.scheduler.outcome import StepOutcome
from pagedkv.scheduler.plan import StepPlan
from pagedkv.scheduler.recording import POLICIES, ROLES, RecordingError, digest_of
from pagedkv.scheduler.request import Request
from pagedkv.scheduler.scheduler import Scheduler

__all__ = ["replay_recording"]

READABLE = (1, 2)
"""Versions that can be replayed. The first does not tell steps by number, what was raised, or which plan an update was of."""
MAX_LINE_CHARS = 2**26
"""Documented cap on one line: a prompt of the longest kind takes more, and an engine that serves such has other means."""
REFUSALS = ("DuplicateIdError", "InvalidArgumentError", "QueueFullError", "RequestTooLargeError")
"""What `add` itself may raise. Anything else was raised by a sink, when the request was taken or refused already."""


def replay_recording(
    lines: Iterable[str], sink: EventSink | None = None, *, max_blocks: int = 2**20
) -> Iterator[StepPlan]:
    """Make every decision of a recording again, and yield each plan; `sink` gets the same events, byte for byte.

    max_blocks: cap on either pool, at about 28 bytes a block: one line from elsewhere must not take all memory

    Raises RecordingError for lines that cannot be read, for a plan that differs from the recorded one, for a call that is
    refused and was not, or the other way round, and at a step whose planning failed. Of calls that were refused, version 1
    tells nothing; it is replayed as far as that leaves no doubt.
    """
    numbered = enumerate(lines, start=1)
    header = _parse(*next(numbered, (1, "")))
    scheduler = _make_scheduler(header, sink, max_blocks)
    call_again = _call_first_version_again if header["recording"] == 1 else _call_again
    plan: StepPlan | None = None
    for number, line in numbered:
        record = _parse(number, line)
        try:
            if record["call"] == "schedule":
                plan = _plan_again(scheduler, record, number)
                yield plan
            else:
                call_again(scheduler, plan, record, number)
        except KeyError as error:
            raise RecordingError(f"line {number}: expected a call with its arguments, no {error} found") from None


def _plan_again(scheduler: Scheduler, record: dict[str, Any], number: int) -> StepPlan:
    if "failed" in record:
        raise RecordingError(
            f"line {number}: planning this step raised {record['failed']!s:.60} when it was recorded; what it had decided by "
            "then cannot be decided again"
        )
    try:
        drafts = dict(record["drafts"]) if "drafts" in record else None
    except (TypeError, ValueError):
        raise RecordingError(
            f"line {number}: expected drafts as pairs of a row and its tokens, found {type(record['drafts']).__name__}"
        ) from None
    try:
        plan = scheduler.schedule(record["now"], drafts)
    except PagedKVError as error:
        raise RecordingError(f"line {number}: the step cannot be planned again: {error}") from None
    if record.get("step", plan.step) != plan.step:
        raise RecordingError(f"line {number}: expected step {shown(record['step'])}, found step {plan.step}")
    if digest_of(plan) != record["plan"]:
        raise RecordingError(f"line {number}: step {plan.step} was recorded with another plan")
    return plan


def _call_again(scheduler: Scheduler, plan: StepPlan | None, record: dict[str, Any], number: int) -> None:
    """Make a call that is no schedule again, and see to it that it raises what it did: `add` may, the others did not."""
    error = _error_of(scheduler, plan, record, number)
    found = None if error is None else type(error).__name__
    expected = record.get("raised")
    if found != expected and (expected is None or expected in REFUSALS):
        raise RecordingError(
            f"line {number}: expected {record['call']} to raise {expected or 'nothing'} as it did, "
            f"found {found or 'nothing raised'}"
        )


def _call_first_version_again(scheduler: Scheduler, plan: StepPlan | None, record: dict[str, Any], number: int) -> None:
    """As `_call_again`, where nobody knows what was raised: what raises now did then, and changed nothing.

    But an update of an old plan, which was refused, is one of the plan in flight here; it shows when that is updated next.
    """
    if isinstance(_error_of(scheduler, plan, record, number), StalePlanError):
        raise RecordingError(
            f"line {number}: version 1 does not tell which plan an update is of, and this step was ended before"
        )


def _error_of(scheduler: Scheduler, plan: StepPlan | None, record: dict[str, Any], number: int) -> PagedKVError | None:
    """Make a call that is no schedule; returns what it raised, if not for a bug of ours."""
    call, now = record["call"], record["now"]
    if call not in ("add", "abort", "update", "fail"):
        raise RecordingError(f"line {number}: expected add, abort, schedule, update or fail, found {call!r}")
    if plan is None and call in ("update", "fail"):
        raise RecordingError(f"line {number}: expected schedule before {call}")
    request = _decode_request(record["request"], number) if call == "add" else None
    try:
        if request is not None:
            scheduler.add(request, now)
        elif call == "abort":
            scheduler.abort(record["request_id"], now)
        elif plan is not None and call == "update":
            scheduler.update(plan, _decode_outcome(record), now)
        elif plan is not None:
            scheduler.fail(plan, now, str(record["reason"]))
    except InvariantViolation:
        raise
    except PagedKVError as error:
        return error
    return None


def _decode_outcome(record: dict[str, Any]) -> StepOutcome | list[int] | None:
    if "num_tokens" not in record:
        tokens: list[int] | None = record["token_ids"]
        return tokens
    return StepOutcome(record["token_ids"], record["num_tokens"], record["stopped"])


def _parse(number: int, line: str) -> dict[str, Any]:
    """A line's object. No error shows what the line holds: it may be somebody's prompt."""
    if len(line) > MAX_LINE_CHARS:
        raise RecordingError(f"line {number}: expected at most {MAX_LINE_CHARS} characters, found {len(line)}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise RecordingError(f"line {number}: expected a JSON object, found {len(line)} characters that are none")
    return record


def _make_scheduler(header: dict[str, Any], sink: EventSink | None, max_blocks: int) -> Scheduler:
    if header.get("recording") not in READABLE:
        found = shown(header.get("recording"))
        raise RecordingError(
            f"line 1: expected a recording of version {' or '.join(map(str, READABLE))}, found {found}"
        )
    try:
        config = _cache_config(header["cache"], max_blocks)
        manager = KVCacheManager(config, eviction=make_policy(header["eviction"], config.num_blocks))
        policies: dict[str, Any] = {}
        for role in ROLES:
            fields = dict(header[role])
            policies[role] = POLICIES[fields.pop("name")](**fields)
        # Recordings of before there was a bound on preemptions hold none.
        limits = {"max_preemptions": MAX_PREEMPTIONS, **header["scheduler"]}
        return Scheduler(SchedulerConfig(**limits), manager, sink=sink, **policies)
    except RecordingError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordingError(f"line 1: the header does not describe a scheduler: {shown(str(error))}") from None


def _cache_config(fields: dict[str, Any], max_blocks: int) -> CacheConfig:
    config = CacheConfig(**{**fields, "identity": CacheIdentity(**fields["identity"])})
    if max(config.num_blocks, config.num_host_blocks) > max_blocks:
        raise RecordingError(f"line 1: expected pools of at most {max_blocks} blocks, found more")
    return config


def _decode_request(fields: dict[str, Any], number: int) -> Request:
    """The request of an `add`. Whatever was recorded was one, so one that cannot be made is a RecordingError."""
    try:
        encoded = fields["prompt"]
        prompt: Prompt = encoded
        if isinstance(encoded, dict):
            prompt = SimulatedPrompt(encoded["num_tokens"], encoded["ids"], encoded["size"])
        extras = tuple(ExtraKey(start, stop, bytes.fromhex(digest)) for start, stop, digest in fields["extras"])
        salt = bytes.fromhex(fields["salt"])
        return Request(**{**fields, "prompt": prompt, "salt": salt, "extras": extras})
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"line {number}: expected a request, found {type(error).__name__} in it") from None
