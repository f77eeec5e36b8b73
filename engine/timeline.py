"""A timeline of the engine's steps and requests, for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s, Rows
from pagedkv.engine.trace_file import TraceFile
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import Event, Scheduler, StepEvents, StepPlan
from pagedkv.scheduler.events import Aborted, Added, Admitted, Finished, Preempted, Refused, StepFailed

__all__ = ["StepTimes", "Timeline"]

_ENGINE, _REQUESTS = 1, 2  # process ids
_PREEMPTIONS, _REJECTIONS, _STEPS = 1, 2, 3  # thread ids within the engine
_COUNTERS = ("KV blocks used", "requests running", "requests waiting")

_NAMES = (
    {"name": "process_name", "ph": "M", "pid": _ENGINE, "args": {"name": "engine"}},
    {"name": "process_name", "ph": "M", "pid": _REQUESTS, "args": {"name": "requests"}},
    {"name": "thread_name", "ph": "M", "pid": _ENGINE, "tid": _STEPS, "args": {"name": "steps"}},
    {"name": "thread_name", "ph": "M", "pid": _ENGINE, "tid": _PREEMPTIONS, "args": {"name": "preemptions"}},
    {"name": "thread_name", "ph": "M", "pid": _ENGINE, "tid": _REJECTIONS, "args": {"name": "rejections"}},
)

# One format for a step and its parts: a single pass over the numbers costs half of five.
_SPAN = f'{{"name":"%s","ph":"X","pid":{_ENGINE},"tid":{_STEPS},"ts":%.3f,"dur":%.3f'
_STEP = ",\n".join(
    (
        _SPAN + ',"args":{"step":%d,"num_rows":%d,"num_tokens":%d,"num_waiting":%d,"num_used_blocks":%d}}',
        *(_SPAN.replace("%s", part, 1) + "}" for part in ("schedule", "model", "sample", "update")),
    )
)
_COUNTER = f'{{"name":"%s","ph":"C","pid":{_ENGINE},"ts":%.3f,"args":{{"value":%d}}}}'


class StepTimes(NamedTuple):
    """The moments of a step, in seconds, ascending: its parts lie between them.

    start_s to scheduled_s: schedule; to computed_s: model; to sampled_s: sample; to end_s: update
    """

    start_s: float
    scheduled_s: float
    computed_s: float
    sampled_s: float
    end_s: float


class _Track:
    """A live sample: its track in the file, the phase that it is in, and its row while it has a seat."""

    __slots__ = ("has_token", "label", "number", "phase", "row")

    def __init__(self, number: int, request_id: str, sample_idx: int) -> None:
        self.number = number
        self.label = json.dumps(f"{request_id} #{sample_idx}" if sample_idx else request_id)
        self.phase = ""
        """Empty until the track has begun."""
        self.row = -1
        self.has_token = False


class Timeline:
    """Writes what the engine does as it happens, in Chrome's trace event format.

    Process `engine` has the steps, named such as `prefill 512 + decode 31` (tokens, then rows), with their parts in
    them; all preemptions, rejections and failed steps; and counters, a point per change. Process `requests` has a track
    per sample, with the phases `queue`, `prefill`, `decode` and `preempted`. Names agree with the simulator's.

    It holds what is live and at most 64 KiB of text. Whole events go to the file about once a second, and a file that
    lacks its end, because the process died, still loads. One thread feeds it; after `close` it ignores what it hears.

        timeline = Timeline("engine.trace.json")
        scheduler = Scheduler(config, manager, sink=timeline)
        timeline.watch(scheduler)
        ...
        timeline.on_schedule(plan)                # after `scheduler.schedule`
        timeline.on_step(plan, events, times)     # after `scheduler.update`
    """

    def __init__(self, file: TextIO | str | Path) -> None:
        """Write to a path, which is emptied first, or to an open text file, which stays open when this is closed."""
        self._file = TraceFile(file)
        self._scheduler: Scheduler | None = None
        self._levels = (-1, -1, -1)
        self._planned: tuple[int, int, int] = (0, 0, 0)
        self._planned_name = ""
        self._num_tracks = 0
        self._tracks: dict[str, dict[int, _Track]] = {}
        self._finished: list[Finished] = []
        # By row: whether it computes tokens that are known, and whose row it is.
        self._is_prefill: NDArray[np.bool_] = np.zeros(64, np.bool_)
        self._seated: list[_Track | None] = [None] * 64
        self._num_prefilling = 0
        self._takers: dict[type[Any], Callable[[Any], None]] = {
            Added: self._take_added,
            Refused: self._take_refused,
            Admitted: self._take_admitted,
            Preempted: self._take_preempted,
            Finished: self._finished.append,  # It ends in `on_step`, after its last token.
            Aborted: self._take_aborted,
            StepFailed: self._take_failed,
        }
        for name in _NAMES:
            self._file.write(json.dumps(name, separators=(",", ":")))
        self._file.flush()

    def watch(self, scheduler: Scheduler) -> None:
        """Read the counters from this scheduler from now on; before, they are 0."""
        self._scheduler = scheduler

    # Feeding

    def emit(self, event: Event) -> None:
        """Take an event of the scheduler. O(1)."""
        take = self._takers.get(type(event))
        if take is not None and self._file.is_open:
            take(event)

    def on_schedule(self, plan: StepPlan) -> None:
        """Note who runs in the step, and the counters while it runs. O(rows)."""
        if not self._file.is_open:
            return
        for row, request_id, sample_idx in plan.admitted:
            self._seat(row, request_id, sample_idx)
        self._planned = self._read_levels()
        self._planned_name = self._name(plan.rows, plan.num_tokens)

    def on_step(self, plan: StepPlan, events: StepEvents, times: StepTimes) -> None:
        """Write a step that was carried out, once the scheduler was updated. O(rows).

        Raises InvalidArgumentError unless the times ascend; nothing is written then.
        """
        if not self._file.is_open:
            return
        start, scheduled, computed, sampled, end = moments = [_ns(time) for time in times]
        if moments != sorted(moments):
            raise InvalidArgumentError(f"the moments of a step must ascend, found {times}")
        used, _, waiting = self._planned
        num_tokens = int(np.add.reduce(plan.num_tokens))
        self._file.write(
            _STEP
            % (
                *(self._planned_name, start / 1000, (end - start) / 1000),
                *(plan.step, len(plan.rows), num_tokens, waiting, used),
                *(start / 1000, (scheduled - start) / 1000, scheduled / 1000, (computed - scheduled) / 1000),
                *(computed / 1000, (sampled - computed) / 1000, sampled / 1000, (end - sampled) / 1000),
            )
        )
        self._write_levels(self._planned, start)
        if self._finished:
            self._end_finished(end)
        if self._num_prefilling:
            self._begin_decodes(events.rows, end)
        self._write_levels(self._read_levels(), end)
        self._file.flush_if_old(end)

    # Ending

    def close(self) -> None:
        """Complete the file. Tracks of live requests stay open, which viewers show as unfinished."""
        self._file.close()

    def abandon(self) -> None:
        """Let go of a file that could not be written. What it holds still loads."""
        self._file.abandon()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Events

    def _take_added(self, event: Added) -> None:
        self._num_tracks += 1
        track = _Track(self._num_tracks, event.request_id, 0)
        self._tracks[event.request_id] = {0: track}
        args = {"prompt_tokens": event.num_prompt_tokens, "max_new_tokens": event.max_new_tokens}
        self._begin(track, "queue", _ns(event.time), args)

    def _take_refused(self, event: Refused) -> None:
        self._mark("rejection", _REJECTIONS, event.time, {"request": event.request_id, "reason": event.reason})

    def _take_failed(self, event: StepFailed) -> None:
        args = {"step": event.step, "num_rows": event.num_rows, "reason": event.reason}
        self._mark("step failed", _STEPS, event.time, args)

    def _take_admitted(self, event: Admitted) -> None:
        track = self._tracks.get(event.request_id, {}).get(event.sample_idx)
        if track is not None:
            goes_on = event.mode == "swapped in" and track.has_token
            self._begin(track, "decode" if goes_on else "prefill", _ns(event.time))

    def _take_preempted(self, event: Preempted) -> None:
        names = ("mode", "step", "num_computed_tokens", "num_used_before", "num_used_after")
        args = {"request": event.request_id} | {name: getattr(event, name) for name in names}
        self._mark("preemption", _PREEMPTIONS, event.time, args)
        track = self._tracks.get(event.request_id, {}).get(event.sample_idx)
        if track is not None:
            self._unseat(track)
            self._begin(track, "preempted", _ns(event.time))

    def _take_aborted(self, event: Aborted) -> None:
        # One event per sample: the first one ends them all.
        for track in self._tracks.pop(event.request_id, {}).values():
            self._end(track, _ns(event.time), {"finish_reason": "abort"})
        if self._scheduler is not None and self._scheduler.in_flight is None:
            self._write_levels(self._read_levels(), _ns(event.time))

    # Steps

    def _seat(self, row: int, request_id: str, sample_idx: int) -> None:
        tracks = self._tracks.get(request_id)
        if tracks is None:
            return
        if row >= len(self._seated):
            num_more = max(row + 1 - len(self._seated), len(self._seated))
            self._seated += [None] * num_more
            self._is_prefill = np.concatenate((self._is_prefill, np.zeros(num_more, np.bool_)))
        if sample_idx not in tracks:
            # A fork computes nothing in this step; like a prompt, it gets its first token from it and then decodes.
            self._num_tracks += 1
            tracks[sample_idx] = _Track(self._num_tracks, request_id, sample_idx)
        track, occupant = tracks[sample_idx], self._seated[row]
        self._unseat(track)
        if occupant is not None:  # A fork whose step failed left no word.
            self._unseat(occupant)
        track.row = row
        self._seated[row] = track
        self._is_prefill[row] = track.phase != "decode"
        self._num_prefilling += track.phase != "decode"

    def _unseat(self, track: _Track) -> None:
        row = track.row
        if row >= 0:
            self._num_prefilling -= int(self._is_prefill[row])
            self._is_prefill[row] = False
            self._seated[row] = None
            track.row = -1

    def _name(self, rows: Rows, num_tokens: Int64s) -> str:
        if not len(rows):
            return "empty"
        if not self._num_prefilling:
            return f"decode {len(rows)}"
        is_prefill = self._is_prefill[rows]
        num_decodes = len(rows) - int(np.count_nonzero(is_prefill))
        parts = [f"prefill {num_tokens[is_prefill].sum()}"] if num_decodes < len(rows) else []
        return " + ".join(parts + [f"decode {num_decodes}"] * (num_decodes > 0))

    def _begin_decodes(self, rows: Rows, time: int) -> None:
        """Rows whose known tokens are computed have got their first new one."""
        for row in rows[self._is_prefill[rows]].tolist():
            self._is_prefill[row] = False
            self._num_prefilling -= 1
            track = self._seated[row]
            if track is not None:
                track.has_token = True
                self._begin(track, "decode", time)

    def _end_finished(self, time: int) -> None:
        """End the samples of which the scheduler said that they finished in this step."""
        for event in self._finished:
            tracks = self._tracks.get(event.request_id, {})
            track = tracks.pop(event.sample_idx, None)
            if track is not None:
                self._end(track, time, {"finish_reason": event.reason, "output_tokens": event.num_output_tokens})
                if not tracks:
                    del self._tracks[event.request_id]
        self._finished.clear()

    def _read_levels(self) -> tuple[int, int, int]:
        scheduler = self._scheduler
        if scheduler is None:
            return 0, 0, 0
        return scheduler.manager.memory.pool.num_used, scheduler.num_running, scheduler.num_waiting

    # Lines

    def _begin(self, track: _Track, phase: str, time: int, args: dict[str, Any] | None = None) -> None:
        """End the phase that the sample is in, if any, and begin another."""
        if track.phase:
            self._write_async("e", f'"{track.phase}"', track, time)
        else:
            self._write_async("b", track.label, track, time, args)
        self._write_async("b", f'"{phase}"', track, time)
        track.phase = phase

    def _end(self, track: _Track, time: int, args: dict[str, Any]) -> None:
        self._unseat(track)
        if track.phase:
            self._write_async("e", f'"{track.phase}"', track, time)
            self._write_async("e", track.label, track, time, args)

    def _write_async(self, kind: str, name: str, track: _Track, time: int, args: dict[str, Any] | None = None) -> None:
        more = f',"args":{json.dumps(args, separators=(",", ":"))}' if args else ""
        self._file.write(
            f'{{"name":{name},"cat":"request","ph":"{kind}","id":"0x{track.number:x}","pid":{_REQUESTS},"tid":1,'
            f'"ts":{time / 1000:.3f}{more}}}'
        )

    def _mark(self, name: str, thread_id: int, time_s: float, args: dict[str, Any]) -> None:
        self._file.write(
            f'{{"name":"{name}","ph":"i","s":"t","pid":{_ENGINE},"tid":{thread_id},"ts":{_ns(time_s) / 1000:.3f},'
            f'"args":{json.dumps(args, separators=(",", ":"))}}}'
        )

    def _write_levels(self, levels: tuple[int, int, int], time: int) -> None:
        """A point for each counter that has changed."""
        if levels == self._levels:
            return
        for name, level, before in zip(_COUNTERS, levels, self._levels, strict=True):
            if level != before:
                self._file.write(_COUNTER % (name, time / 1000, level))
        self._levels = levels


def _ns(seconds: float) -> int:
    """Whole nanoseconds, so that spans which share a moment share it exactly and nest."""
    return round(seconds * 1e9)
