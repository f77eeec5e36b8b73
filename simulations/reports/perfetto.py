"""`trace.perfetto.json`: counters over time and the life of each request, for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.reports.timeline import Timeline
from pagedkv.simulations.run import Run

__all__ = ["MAX_POINTS", "MAX_SHOWN", "write_perfetto"]

MAX_POINTS = 5_000  # points of each counter
MAX_SHOWN = 10_000  # requests, preemptions and rejections

_ENGINE, _REQUESTS = 1, 2  # process ids
_PREEMPTIONS, _REJECTIONS = 1, 2  # thread ids within the engine
_COUNTERS = (
    ("KV blocks used", "num_used_blocks"),
    ("requests running", "num_rows"),
    ("requests waiting", "num_waiting"),
    ("tokens per step", "num_tokens"),
)

Ticks = NDArray[np.int64]


def write_perfetto(run: Run, path: Path) -> Path:
    """Write the run in Chrome's trace event format and return `path`.

    Process 1 has the counters, each point the maximum over an interval, and all preemptions and rejections. Process 2
    has one lane per request in the system: a span `request`, within it `queue`, `prefill` (from admission to the first
    token) and `decode`, and marks for preemptions. At most `MAX_SHOWN` of each kind are shown, the first ones;
    `otherData` tells how many were left out. Time unit: µs, to the nanosecond. O(steps + requests log requests).
    """
    log = run.requests
    shown = np.flatnonzero(~np.isnan(log.finished_s))
    num_finished = len(shown)
    shown = shown[:MAX_SHOWN]
    timeline = Timeline(run.steps, start_s=float(run.trace.arrival_s[0]), max_intervals=MAX_POINTS - 1)
    arrivals, finishes = _ticks(run.trace.arrival_s[shown]), _ticks(log.finished_s[shown])
    lanes = _lanes(arrivals, finishes)
    lines = [
        *_names(lanes),
        *_counters(run, timeline),
        *_preemptions(run, dict(zip(shown.tolist(), lanes, strict=True))),
        *_rejections(run),
        *_requests(run, shown, np.array(lanes, np.int64)),
    ]
    about = {
        "trace": run.trace.name,
        "digest": run.trace.digest,
        "counter_points": "one per change" if timeline.is_exact else f"maximum of each {timeline.interval_s:.6g} s",
        "requests_shown": len(shown),
        "requests_left_out": num_finished - len(shown),
        "preemptions_left_out": max(len(run.preemptions) - MAX_SHOWN, 0),
        "rejections_left_out": max(len(run.rejections) - MAX_SHOWN, 0),
    }
    head = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n'
    path.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="ascii", newline="\n")
    return path


def _ticks(seconds: NDArray[np.float64]) -> Ticks:
    """Whole nanoseconds, so that spans which share a moment share it exactly and nest."""
    return np.round(seconds * 1e9).astype(np.int64)


def _lanes(starts: Ticks, ends: Ticks) -> list[int]:
    """The lowest lane that is free for each span, by start; spans in one lane do not overlap. O(n log n)."""
    lanes: list[int] = []
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        while busy and busy[0][0] <= start:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy) + 1
        heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes


def _names(lanes: list[int]) -> list[str]:
    """Metadata events that name the processes and threads."""
    processes = ((_ENGINE, "engine"), (_REQUESTS, "requests"))
    threads = [(_ENGINE, _PREEMPTIONS, "preemptions"), (_ENGINE, _REJECTIONS, "rejections")]
    threads += [(_REQUESTS, lane, f"lane {lane}") for lane in range(1, max(lanes, default=0) + 1)]
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}} for pid, name in processes
    ]
    events += [
        {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}} for pid, tid, name in threads
    ]
    return [json.dumps(event, separators=(",", ":")) for event in events]


def _counters(run: Run, timeline: Timeline) -> list[str]:
    if not len(timeline):
        return []
    times = (_ticks(timeline.edges_s) / 1000).tolist()
    lines: list[str] = []
    for name, column in _COUNTERS:
        # A counter keeps its value until the next point, and everything ends at zero.
        values = np.append(timeline.maximum(run.steps.column(column)), 0.0).astype(np.int64)
        is_change = np.append(True, values[1:] != values[:-1])
        form = f'{{"name":"{name}","ph":"C","pid":{_ENGINE},"ts":%.3f,"args":{{"value":%d}}}}'
        points = zip(times, values.tolist(), is_change.tolist(), strict=True)
        lines += [form % (time, value) for time, value, changes in points if changes]
    return lines


def _preemptions(run: Run, lane_of: dict[int, int]) -> list[str]:
    """An instant in the engine's list of preemptions, and one on the request's own lane where it has one."""
    form = (
        '{"name":"preemption","ph":"i","s":"t","pid":%d,"tid":%d,"ts":%.3f,"args":{"request":%d,"mode":"%s",'
        '"step":%d,"num_computed_tokens":%d,"num_used_before":%d,"num_used_after":%d}}'
    )
    lines: list[str] = []
    for event in run.preemptions[:MAX_SHOWN]:
        request = int(event.request_id)
        counts = (event.step, event.num_computed_tokens, event.num_used_before, event.num_used_after)
        fields = (event.time * 1e6, request, event.mode, *counts)
        lines.append(form % (_ENGINE, _PREEMPTIONS, *fields))
        if request in lane_of:
            lines.append(form % (_REQUESTS, lane_of[request], *fields))
    return lines


def _rejections(run: Run) -> list[str]:
    form = '{"name":"rejection","ph":"i","s":"t","pid":%d,"tid":%d,"ts":%.3f,"args":{"request":%d,"reason":%s}}'
    shown = sorted(run.rejections.items())[:MAX_SHOWN]
    arrivals = (run.trace.arrival_s * 1e6).tolist()
    return [form % (_ENGINE, _REJECTIONS, arrivals[request], request, json.dumps(reason)) for request, reason in shown]


def _requests(run: Run, shown: NDArray[np.int64], lanes: NDArray[np.int64]) -> list[str]:
    trace, log = run.trace, run.requests
    form = (
        f'{{"name":"request","ph":"X","pid":{_REQUESTS},"tid":%d,"ts":%.3f,"dur":%.3f,"args":{{"request":%d,'
        '"prompt_tokens":%d,"output_tokens":%d,"prefix_hit_tokens":%d,"num_preemptions":%d}}'
    )
    moments = [_ticks(times[shown]) for times in (trace.arrival_s, log.admitted_s, log.first_token_s, log.finished_s)]
    counts = (shown, *(column[shown] for column in (trace.prompt_tokens, log.num_output, log.num_hit)))
    lines = _spans(form, lanes, moments[0], moments[-1], *counts, log.num_preemptions[shown])
    for name, start, end in zip(("queue", "prefill", "decode"), moments[:-1], moments[1:], strict=True):
        has_length = end > start
        form = f'{{"name":"{name}","ph":"X","pid":{_REQUESTS},"tid":%d,"ts":%.3f,"dur":%.3f}}'
        lines += _spans(form, lanes[has_length], start[has_length], end[has_length])
    return lines


def _spans(form: str, lanes: NDArray[np.int64], starts: Ticks, ends: Ticks, *args: NDArray[np.int64]) -> list[str]:
    columns = (lanes, starts / 1000, (ends - starts) / 1000, *args)
    return [form % row for row in zip(*(column.tolist() for column in columns), strict=True)]
