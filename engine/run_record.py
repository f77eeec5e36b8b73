"""Record what an engine did, so that `pagedkv fit` can learn step times from it and `pagedkv replay` can play it again.

A record is a folder: `run.json` (configuration), `steps.csv` (one line per step) and `trace.jsonl` (one line per request, a
trace that `pagedkv replay` reads as it is). It holds lengths, times and numbers for equal prompt blocks, never a token.
docs/recorded_runs.md describes the fields. An engine's loop makes four calls:

    recorder = RunRecorder("runs/monday", scheduler, model={"name": name, "device": "cpu"}, origin_s=clock())

    scheduler.add(request, now)                    # if this refuses the request, it is not part of the run
    recorder.on_request(request, now)

    start = clock()
    plan = scheduler.schedule(start)
    tokens = run_model(plan)
    end = clock()
    waiting, used = scheduler.num_waiting, scheduler.manager.memory.pool.num_used
    events = scheduler.update(plan, tokens, end)
    recorder.on_step(plan, start, end, num_waiting=waiting, num_used_blocks=used)
    for sample, reason in events.finished:         # and for every sample of a request that was aborted
        recorder.on_finish(
            sample.request.request_id,
            sample.sample_idx,
            reason,
            first_token_s=first_token_s,           # None if it got none
            end_s=end,
            num_output_tokens=num_output_tokens,
            num_preemptions=sample.num_preemptions,
        )

    recorder.close()

A step that failed is not recorded: nothing came of it. Its time shows as a gap between steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pagedkv import InvalidArgumentError, SimulatedPrompt, UnknownIdError, __version__
from pagedkv.block_keys import Key
from pagedkv.scheduler import FinishReason, Request, Scheduler, Seat, StepPlan
from pagedkv.scheduler.recording import POLICIES, ROLES

__all__ = ["STEP_COLUMNS", "RunRecorder"]

VERSION = 1
FLUSH_EVERY_S = 1.0
LEAST_STEP_S = 1e-6
OWN_ENDS = (FinishReason.LENGTH, FinishReason.STOP)
STEP_COLUMNS = (
    "start_s",
    "end_s",
    "num_rows",
    "num_tokens",
    "num_sampled",
    "num_context_tokens",
    "num_attention_pairs",
    "num_copied_blocks",
    "num_swapped_in_blocks",
    "num_swapped_out_blocks",
    "num_waiting",
    "num_used_blocks",
)


class LineFile:
    """A file that grows by whole lines: a process that dies leaves no half of one behind."""

    __slots__ = ("_file", "_lines")

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._lines: list[str] = []

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def append(self, line: str) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        if self._lines:
            self._file.write("".join(self._lines).encode("utf-8"))
            self._file.flush()
            self._lines.clear()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()


class PendingRequest:
    """A request that has not been written yet: it, or one that arrived before it, has not ended."""

    __slots__ = ("fields", "num_left", "samples", "was_admitted")

    def __init__(self, fields: dict[str, Any], num_samples: int) -> None:
        self.fields = fields
        self.samples: list[dict[str, Any] | None] = [None] * num_samples
        self.num_left = num_samples
        self.was_admitted = False

    @property
    def is_in_trace(self) -> bool:
        """Whether it used the engine at all: one that was ended from outside before it had a seat did not."""
        return self.was_admitted or any(sample is not None and sample["reason"] in OWN_ENDS for sample in self.samples)


class RunRecorder:
    """Writes the record of one run. Times are seconds of the engine's clock, any clock; `origin_s` becomes 0.

    Lines reach the file once a second. A request's line is written when it and all that arrived before it have ended, so
    the trace is in order of arrival at any moment; what waits for that is held in memory, as is a name (about 170 bytes)
    for each distinct full block of all prompts. One thread at a time.

    `model` holds facts for people: name, dtype, device, threads. Raises InvalidArgumentError if the folder holds a record
    already, or for a scheduler with policies that are not pagedkv's own, which a record cannot name.
    """

    def __init__(
        self,
        folder: str | Path,
        scheduler: Scheduler,
        *,
        model: Mapping[str, str | int | float | None] | None = None,
        origin_s: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self._header = _describe(scheduler, dict(model or {}))
        self._manager = scheduler.manager
        self._origin_s = origin_s
        self._last_arrival_s = 0.0
        self._last_flush_s = 0.0
        self._num_steps = self._num_requests = self._num_left_out = 0
        self._ids: dict[Key, int] = {}
        self._clients: dict[str | int | None, int] = {}
        self._live: dict[str, PendingRequest] = {}
        self._pending: deque[PendingRequest] = deque()
        if (self.folder / "run.json").exists():
            raise InvalidArgumentError(f"{self.folder} holds a recorded run already: choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._steps = LineFile(self.folder / "steps.csv")
        self._trace = LineFile(self.folder / "trace.jsonl")
        self._steps.append(",".join(STEP_COLUMNS) + "\n")
        self._flush()
        self._write_header(is_complete=False)

    def on_request(self, request: Request, now: float) -> None:
        """A request has arrived and was accepted; `now` is when its user sent it. O(prompt), half a µs per block.

        Raises InvalidArgumentError for an arrival before the one before, or before the origin, or of an id that is live.
        """
        arrival_s = float(now - self._origin_s)
        if not self._last_arrival_s <= arrival_s < math.inf:
            raise InvalidArgumentError(
                f"arrivals must be in order, not before {self._last_arrival_s} s of the run, found {arrival_s}"
            )
        if request.request_id in self._live:
            raise InvalidArgumentError(f"request {request.request_id!r} is live already")
        num_tokens, runs = self._name_blocks(request)
        fields: dict[str, Any] = {"arrival_s": arrival_s, "prompt_tokens": num_tokens, "output_tokens": 0}
        if runs:
            fields |= {"hash_block_size": self._manager.config.block_size, "hash_runs": runs}
        # A number: names may be people's. In every line, as a trace has it; those without a client are one client's.
        fields["client"] = self._clients.setdefault(request.client, len(self._clients))
        fields |= {"request_id": request.request_id, "max_new_tokens": request.max_new_tokens}
        fields |= {"priority": request.priority, "reads_cache": request.reads_cache}
        self._last_arrival_s = arrival_s
        pending = self._live[request.request_id] = PendingRequest(fields, request.n)
        self._pending.append(pending)

    def on_step(self, plan: StepPlan, start_s: float, end_s: float, *, num_waiting: int, num_used_blocks: int) -> None:
        """A step was carried out, from before it was planned to when its tokens were there. O(rows) array operations.

        num_waiting, num_used_blocks: as they were while the step ran, between `schedule` and `update`
        A plan without rows is no step. One that a coarse clock gives no time is told as a microsecond, since readers divide
        by it. Raises InvalidArgumentError unless origin <= start <= end.
        """
        num_rows = len(plan.rows)
        if num_rows == 0:
            return
        start_s, end_s = float(start_s - self._origin_s), float(end_s - self._origin_s)
        if not 0 <= start_s <= end_s < math.inf:
            raise InvalidArgumentError(f"a step must begin in the run and not end before, found {start_s} to {end_s} s")
        if end_s == start_s:
            end_s += LEAST_STEP_S
        num_tokens, num_context, num_pairs = _sum_up(plan)
        self._steps.append(
            f"{start_s},{end_s},{num_rows},{num_tokens},{len(plan.sampling_rows)},{num_context},{num_pairs},"
            f"{len(plan.copies)},{len(plan.swaps_in)},{len(plan.swaps_out)},{num_waiting},{num_used_blocks}\n"
        )
        self._num_steps += 1
        self.on_seats(plan.admitted)
        if end_s - self._last_flush_s >= FLUSH_EVERY_S:
            self._last_flush_s = end_s
            self._flush()

    def on_seats(self, seats: Sequence[Seat]) -> None:
        """These seats were taken in a step that was carried out: for requests that end before it is told. O(seats)."""
        for seat in seats:
            pending = self._live.get(seat.request_id)
            if pending is not None:
                pending.was_admitted = True

    def on_finish(
        self,
        request_id: str,
        sample_idx: int,
        reason: str,
        *,
        first_token_s: float | None,
        end_s: float,
        num_output_tokens: int,
        num_preemptions: int = 0,
    ) -> None:
        """One of a request's samples has ended, by itself or because the request was aborted. O(1) amortised.

        Each of its `n` samples ends once; those of a request that was aborted before it forked have 0 tokens each.
        Raises UnknownIdError for a sample that is not live, InvalidArgumentError for a time that is not finite.
        """
        pending = self._live.get(request_id)
        if pending is None or not 0 <= sample_idx < len(pending.samples) or pending.samples[sample_idx] is not None:
            raise UnknownIdError(f"no live sample {sample_idx} of request {request_id!r}")
        first_token_s = None if first_token_s is None else float(first_token_s - self._origin_s)
        end_s = float(end_s - self._origin_s)
        if not math.isfinite(end_s) or not (first_token_s is None or math.isfinite(first_token_s)):
            raise InvalidArgumentError(f"times of a sample must be finite, found {first_token_s} and {end_s}")
        sample = {
            "reason": str(reason),
            "first_token_s": first_token_s,
            "end_s": end_s,
            "num_output_tokens": int(num_output_tokens),
            "num_preemptions": int(num_preemptions),
        }
        pending.samples[sample_idx] = sample
        pending.num_left -= 1
        if pending.fields["max_new_tokens"] == 0:
            # Only its prompt is computed, once: it never becomes several samples, and only one lost its seat.
            pending.samples = [sample, *[sample | {"num_preemptions": 0}] * (len(pending.samples) - 1)]
            pending.num_left = 0
        if not pending.num_left:
            del self._live[request_id]
            while self._pending and not self._pending[0].num_left:
                self._write_request(self._pending.popleft())

    def close(self) -> None:
        """Write what is left and mark the record as complete. Requests that have not ended are left out, and counted."""
        if self._steps.is_closed:
            return
        num_unfinished = len(self._live)
        for pending in self._pending:
            if not pending.num_left:
                self._write_request(pending)
        self._pending.clear()
        self._live.clear()
        self._steps.close()
        self._trace.close()
        self._write_header(
            is_complete=True,
            num_steps=self._num_steps,
            num_requests=self._num_requests,
            num_never_admitted=self._num_left_out,
            num_unfinished=num_unfinished,
        )

    def abandon(self) -> None:
        """Let go of files that could not be written: the record stays that of a run that was cut off."""
        self._steps.abandon()
        self._trace.abandon()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name_blocks(self, request: Request) -> tuple[int, list[list[int]]]:
        """Length of the prompt, and numbers for its full blocks as `[start, count]` runs; equal prefix, equal number."""
        content, num_tokens = self._manager.make_content(
            request.prompt, salt=request.salt, adapter=request.adapter, extras=request.extras
        )
        num_named = num_tokens // self._manager.config.block_size
        if isinstance(request.prompt, SimulatedPrompt) and not len(request.prompt.content_ids):
            num_named = 0
        runs: list[list[int]] = []
        ids = self._ids
        for key in content.keys(num_named)[:num_named]:
            number = ids.setdefault(key, len(ids))
            if runs and runs[-1][0] + runs[-1][1] == number:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
        return num_tokens, runs

    def _write_request(self, pending: PendingRequest) -> None:
        if not pending.is_in_trace:
            self._num_left_out += 1
            return
        samples = [sample for sample in pending.samples if sample is not None]
        # A plain trace knows one length per request: the longest, which says how long the request was there.
        pending.fields["output_tokens"] = max(sample["num_output_tokens"] for sample in samples)
        pending.fields["samples"] = samples
        self._trace.append(json.dumps(pending.fields, separators=(",", ":")) + "\n")
        self._num_requests += 1

    def _flush(self) -> None:
        self._steps.flush()
        self._trace.flush()

    def _write_header(self, **state: Any) -> None:
        """Replace `run.json`, whole or not at all."""
        partial = self.folder / "run.json.part"
        partial.write_text(json.dumps({**self._header, **state}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / "run.json")


def _describe(scheduler: Scheduler, model: dict[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {
        "pagedkv_run": VERSION,
        "pagedkv_version": __version__,
        "model": model,
        "cache": dataclasses.asdict(scheduler.manager.config),
        "eviction": scheduler.manager.memory.pool.policy.name,
        "scheduler": dataclasses.asdict(scheduler.config),
    }
    for role in ROLES:
        policy = getattr(scheduler, role)
        if type(policy) is not POLICIES.get(type(policy).__name__):
            raise InvalidArgumentError(f"a recorded run can only name pagedkv's own policies, found {policy!r}")
        header[role] = {"name": type(policy).__name__, **dataclasses.asdict(policy)}
    return header


def _sum_up(plan: StepPlan) -> tuple[int, int, int]:
    """Tokens computed, context tokens and query-key pairs of a plan: what the simulator hands to its cost models."""
    num_rows = len(plan.rows)
    num_tokens = int(np.add.reduce(plan.num_tokens))
    num_context = int(np.add.reduce(plan.starts)) + num_tokens
    if num_tokens == num_rows:
        return num_tokens, num_context, num_context
    # n tokens from position s on see n * s + n * (n + 1) / 2 keys.
    num_pairs = int(np.dot(plan.num_tokens, 2 * plan.starts + plan.num_tokens + 1)) // 2
    return num_tokens, num_context, num_pairs
