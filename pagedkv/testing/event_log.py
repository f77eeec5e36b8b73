"""Rebuild what a scheduler did from its event log alone, and hold every event against it: for production logs too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagedkv.errors import InvalidArgumentError, InvariantViolation
from pagedkv.testing.event_fields import COUNTS, checked_kind
from pagedkv.testing.event_history import LiveRequest, SampleHistory

__all__ = ["EventLogChecker", "EventLogSummary", "check_event_log"]


@dataclass(slots=True)
class EventLogSummary:
    """What a log tells, counted anew from its lines.

    `num_queries`, `queried_tokens` and `hit_tokens` count first admissions, the `resumed_...` ones those after a
    preemption by recompute, as `MemoryStatistics.prefix` does. `live` are the requests that had not ended with the log.
    """

    num_events: int = 0
    num_added: int = 0
    num_refused: int = 0
    num_finished_samples: int = 0
    num_aborted_requests: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    num_failed_steps: int = 0
    num_output_tokens: int = 0
    num_queries: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    num_resumed_queries: int = 0
    resumed_queried_tokens: int = 0
    resumed_hit_tokens: int = 0
    max_preemptions: int = 0
    """Of one sample that finished."""
    max_seats: int = 0
    """Seats that were surely taken at once: of samples that fork off, those that the log has not named yet do not count."""
    live: list[str] = field(default_factory=list)


class EventLogChecker:
    """Takes the events of one scheduler one after the other; memory for live requests only.

    `max_num_running`, `num_blocks` and `max_preemptions` are the scheduler's limits, if known; the last holds where nobody
    else uses the same memory, and may be set to None while somebody does. `is_from_start=False` takes a log that was
    cut at its beginning: requests that were added before it are not known, and what it says of them is not held against it.
    `max_tokens_per_step` is 1 for a scheduler without drafts, and one more than the most drafts for one with them; None, where
    that is not known, lets any number of tokens come in a step. Steps are held to their order, times are not: clocks may jump.
    """

    def __init__(
        self,
        *,
        max_num_running: int | None = None,
        num_blocks: int | None = None,
        max_preemptions: int | None = None,
        is_from_start: bool = True,
        max_tokens_per_step: int | None = None,
    ) -> None:
        self.max_preemptions = max_preemptions
        self._max_num_running = max_num_running
        self._num_blocks = num_blocks
        self._is_from_start = is_from_start
        self._max_tokens_per_step = max_tokens_per_step
        self._live: dict[str, LiveRequest] = {}
        self._num_seats = 0
        self._last_step = 0
        self._failed_steps = 0
        self.summary = EventLogSummary()

    @property
    def live_ids(self) -> list[str]:
        """Requests that were added and have not ended, in order of arrival."""
        return list(self._live)

    def take_line(self, line: str) -> None:
        """Take one JSON line of an EventLog. Raises InvalidArgumentError for what is not one. O(1)."""
        where = f"event {self.summary.num_events + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidArgumentError(f"{where}: expected a JSON object, found {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise InvalidArgumentError(f"{where}: expected a JSON object, found {line[:60]!r}")
        self.take(record)

    def take(self, record: Mapping[str, Any]) -> None:
        """Take one event as a mapping. Raises InvariantViolation with the number of the event. O(1)."""
        self.summary.num_events += 1
        kind = checked_kind(record, self.summary.num_events)
        for name in COUNTS[kind]:
            self._require("I16", record[name] >= 0, record, f"tells of {name}={record[name]}")
        self._take_step(record)
        getattr(self, f"_take_{kind}")(record)

    def finish(self, *, is_complete: bool = False) -> EventLogSummary:
        """The log is over. With `is_complete`, nothing may be left in the system (I10)."""
        self.summary.live = self.live_ids
        if is_complete and self._live:
            raise InvariantViolation("I10", f"the log ends while {self.live_ids[:20]} are live")
        return self.summary

    # One method for each event

    def _take_added(self, record: Mapping[str, Any]) -> None:
        request_id, num_samples = record["request_id"], record.get("num_samples", 1)
        self._require("I9", request_id not in self._live, record, "was added while it is live")
        self._require("I16", num_samples > 0, record, f"consists of {num_samples} samples")
        num_new = record["max_new_tokens"]
        # A request that wants no token never forks.
        self._live[request_id] = LiveRequest(record["num_prompt_tokens"], num_new, num_samples if num_new else 1)
        self.summary.num_added += 1

    def _take_refused(self, record: Mapping[str, Any]) -> None:
        self._require("I12", record["request_id"] not in self._live, record, "was refused while it is live")
        self.summary.num_refused += 1

    def _take_deferred(self, record: Mapping[str, Any]) -> None:
        request = self._request(record)
        if request is not None:
            waits = any(sample.state in ("waiting", "swapped") for sample in request.samples.values())
            self._require("I15", waits, record, "was deferred, but does not wait")

    def _take_admitted(self, record: Mapping[str, Any]) -> None:
        request, summary = self._request(record), self.summary
        known, hit, mode = record["num_known_tokens"], record["num_hit_tokens"], record["mode"]
        self._require("I16", 0 <= hit < known, record, f"hit {hit} of {known} tokens")
        self._check_usage(record, record["num_used_blocks"])
        self._require("I16", record["num_used_blocks"] > 0, record, "runs in a pool of which nothing is used")
        if mode == "new":
            summary.num_queries += 1
            summary.queried_tokens += known
            summary.hit_tokens += hit
        elif mode == "recomputed":
            summary.num_resumed_queries += 1
            summary.resumed_queried_tokens += known
            summary.resumed_hit_tokens += hit
        if request is None:
            return
        sample = self._sample(request, record)
        self._require("I15", sample.state in ("waiting", "swapped"), record, f"was admitted while it is {sample.state}")
        self._check_mode(sample, record)
        least = request.num_prompt if sample.num_preemptions == 0 else sample.num_known
        most = least if sample.num_preemptions == 0 else request.num_prompt + max(request.max_new_tokens - 1, 0)
        self._require("I15", least <= known <= most, record, f"has {known} known tokens, not {least} to {most}")
        sample.num_known = known
        sample.state, sample.admitted_step = "running", record["step"]
        if sample.num_preemptions == 0:
            request.first_step = record["step"]
        sample.moved_after = self._failed_steps
        self._count_seats(request, record)

    def _take_preempted(self, record: Mapping[str, Any]) -> None:
        request, summary = self._request(record), self.summary
        before, after, computed = record["num_used_before"], record["num_used_after"], record["num_computed_tokens"]
        self._check_usage(record, before)
        self._require("I11", 0 <= after <= before, record, f"was preempted: {before} blocks in use, then {after}")
        summary.num_preemptions += 1
        summary.num_swaps += record["mode"] == "swap"
        if request is None:
            return
        sample = self._sample(request, record)
        # Samples of one request share blocks, so one of them may give nothing back, and so may one that a failed step has
        # left with what it hit; others always hold a block of their own.
        if computed and request.num_samples == 1 and sample.moved_after == self._failed_steps:
            self._require("I11", after < before, record, f"was preempted and no block was gained: {before} in use")
        self._require("I15", sample.state == "running", record, f"was preempted while it is {sample.state}")
        total = request.num_prompt + request.max_new_tokens
        self._require("I15", 0 <= computed < total, record, f"computed {computed} of at most {total} tokens")
        sample.state = "swapped" if record["mode"] == "swap" else "waiting"
        most, count = self.max_preemptions, sample.num_preemptions
        self._require(
            "I13",
            most is None or count < most,
            record,
            f"was preempted, {count} times before; at most {most} are allowed",
        )
        sample.num_preemptions += 1
        sample.moved_after = self._failed_steps
        sample.num_swapped_tokens = computed
        self._count_seats(request, record)
        if after == 0:
            others = (other for other in self._live.values() if other is not request)
            is_empty = not any(other.surely_holds(self._failed_steps) for other in others)
            self._require("I16", is_empty, record, "left others running in a pool of which nothing is used")

    def _take_finished(self, record: Mapping[str, Any]) -> None:
        request, summary = self._request(record), self.summary
        summary.num_finished_samples += 1
        summary.num_output_tokens += record["num_output_tokens"]
        if request is None:
            return
        sample = self._sample(request, record)
        self._require("I15", sample.state == "running", record, f"finished while it is {sample.state}")
        found, preempted = record["num_output_tokens"], record["num_preemptions"]
        is_length = record["reason"] == "length"
        fits = found == request.max_new_tokens if is_length else 0 < found <= request.max_new_tokens
        self._require("I15", fits, record, f"has {found} of {request.max_new_tokens} tokens ({record['reason']})")
        self._check_pace(request.num_prompt + found - sample.num_known, sample, record)
        self._require(
            "I16",
            preempted == sample.num_preemptions,
            record,
            f"counts {preempted} preemptions, the log {sample.num_preemptions}",
        )
        summary.max_preemptions = max(summary.max_preemptions, preempted)
        sample.state = "finished"
        request.num_ended += 1
        self._count_seats(request, record)
        if request.num_ended == request.num_samples:
            del self._live[record["request_id"]]

    def _take_aborted(self, record: Mapping[str, Any]) -> None:
        """One event for each sample that lived; the first ends the request, since one call aborts all."""
        request_id, state = record["request_id"], record["state"]
        request = self._live.get(request_id)
        if request is None:
            self._require("I9", self._may_be_sibling(request_id), record, "was aborted, but is not live")
            return
        self._require(
            "I9", request.may_be(state, self._failed_steps), record, f"was aborted while {state}, which it is not"
        )
        self._num_seats -= request.num_counted_seats
        del self._live[request_id]
        self._last_aborted = (request_id, request.num_samples - request.num_ended - 1)
        self.summary.num_aborted_requests += 1

    def _take_stepfailed(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002 - one signature for all
        self._failed_steps += 1
        self.summary.num_failed_steps += 1

    # What several events have in common

    _last_aborted: tuple[str, int] = ("", 0)

    def _may_be_sibling(self, request_id: str) -> bool:
        """Whether an abort may be of another sample of the request that was aborted just before."""
        last_id, num_left = self._last_aborted
        if not self._is_from_start and request_id != last_id:
            return True
        self._last_aborted = (last_id, num_left - 1)
        return request_id == last_id and num_left > 0

    def _take_step(self, record: Mapping[str, Any]) -> None:
        if "step" in record:
            step = record["step"]
            if self.summary.num_events == 1 or not self._is_from_start:
                self._last_step = min(self._last_step, step)
            self._require("I14", step >= self._last_step, record, f"step {step} follows step {self._last_step}")
            self._last_step = step

    def _request(self, record: Mapping[str, Any]) -> LiveRequest | None:
        request = self._live.get(record["request_id"])
        if request is None and self._is_from_start:
            raise self._violation("I9", record, "is not live: never added, or ended before")
        return request

    def _sample(self, request: LiveRequest, record: Mapping[str, Any]) -> SampleHistory:
        idx = record["sample_idx"]
        self._require(
            "I15", 0 <= idx < request.num_samples, record, f"has {request.num_samples} samples, not number {idx}"
        )
        sample = request.sample(idx)
        self._require("I9", sample.state != "finished", record, f"sample {idx} ended before")
        return sample

    def _check_mode(self, sample: SampleHistory, record: Mapping[str, Any]) -> None:
        mode, hit = record["mode"], record["num_hit_tokens"]
        expected = {"waiting": "recomputed", "swapped": "swapped in"}[sample.state] if sample.num_preemptions else "new"
        # A failed step makes no copies, so those that it was to swap out start over.
        may_start_over = sample.state == "swapped" and self._failed_steps > sample.moved_after
        is_right = mode == expected or (may_start_over and mode == "recomputed")
        self._require("I16", is_right, record, f"was admitted as {mode!r}, not {expected!r}")
        if mode == "swapped in":
            kept = sample.num_swapped_tokens
            self._require("I6", hit == kept, record, f"came back with {hit} tokens, swapped out with {kept}")

    def _check_pace(self, num_tokens: int, sample: SampleHistory, record: Mapping[str, Any]) -> None:
        """So many tokens cannot come in fewer steps, since the one in which the sample was admitted."""
        most, num_steps = self._max_tokens_per_step, record["step"] - sample.admitted_step + 1
        if most is not None:
            fits = num_tokens <= num_steps * most
            self._require("I15", fits, record, f"got {num_tokens} tokens in {num_steps} steps, at most {most} in each")

    def _count_seats(self, request: LiveRequest, record: Mapping[str, Any]) -> None:
        """The request has more or fewer seats than it had before this event."""
        num_seats = request.num_seats
        self._num_seats += num_seats - request.num_counted_seats
        request.num_counted_seats = num_seats
        self.summary.max_seats = max(self.summary.max_seats, self._num_seats)
        limit = self._max_num_running
        if limit is not None:
            self._require("I15", self._num_seats <= limit, record, f"takes seat {self._num_seats} of {limit}")

    def _check_usage(self, record: Mapping[str, Any], num_used: int) -> None:
        most = self._num_blocks
        if most is not None:
            self._require("I16", num_used <= most, record, f"tells of {num_used} blocks in use, there are {most}")

    def _require(self, invariant: str, holds: bool, record: Mapping[str, Any], what: str) -> None:
        if not holds:
            raise self._violation(invariant, record, what)

    def _violation(self, invariant: str, record: Mapping[str, Any], what: str) -> InvariantViolation:
        who = f"{record['event']} {str(record.get('request_id', ''))[:40]!r}"
        return InvariantViolation(invariant, f"event {self.summary.num_events}, {who}: {what}")


def check_event_log(
    lines: Iterable[str],
    *,
    max_num_running: int | None = None,
    num_blocks: int | None = None,
    max_preemptions: int | None = None,
    max_tokens_per_step: int | None = None,
    is_from_start: bool = True,
    is_complete: bool = False,
) -> EventLogSummary:
    """Hold the JSON lines of an EventLog against each other; returns what they tell. O(lines), memory for live requests.

    Raises InvariantViolation with the id of the invariant and the number of the first event that contradicts those before
    it, InvalidArgumentError for a line that is no event. `is_complete`: the system is empty at the end; the other arguments
    are those of EventLogChecker.

    >>> log = ['{"event":"added","time":0,"request_id":"a","num_prompt_tokens":4,"max_new_tokens":1}']
    >>> check_event_log(log).live
    ['a']
    """
    checker = EventLogChecker(
        max_num_running=max_num_running,
        num_blocks=num_blocks,
        max_preemptions=max_preemptions,
        is_from_start=is_from_start,
        max_tokens_per_step=max_tokens_per_step,
    )
    for line in lines:
        checker.take_line(line)
    return checker.finish(is_complete=is_complete)
