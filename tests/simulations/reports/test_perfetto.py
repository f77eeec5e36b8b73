from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedkv.simulations.reports import perfetto
from pagedkv.simulations.reports.perfetto import write_perfetto
from pagedkv.simulations.run import Run


def load(run: Run, folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(write_perfetto(run, folder / "trace.json").read_text())
    return document


def spans(document: dict[str, Any]) -> list[tuple[str, int, float, float]]:
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    return sorted((event["name"], event["tid"], event["ts"], event["dur"]) for event in events)


def test_the_life_of_each_request_is_cut_into_queue_prefill_and_decode(run: Run, tmp_path: Path) -> None:
    assert spans(load(run, tmp_path)) == [
        ("decode", 1, 1e6, 1e6),
        ("prefill", 1, 0.0, 1e6),
        ("prefill", 1, 4e6, 2e6),
        ("queue", 1, 3.5e6, 0.5e6),
        ("request", 1, 0.0, 2e6),
        ("request", 1, 3.5e6, 2.5e6),
    ]


def test_counters_change_where_steps_do_and_end_at_zero(run: Run, tmp_path: Path) -> None:
    events = load(run, tmp_path)["traceEvents"]
    points = [(event["ts"], event["args"]["value"]) for event in events if event["name"] == "KV blocks used"]
    assert points == [(0.0, 2), (2e6, 0), (4e6, 5), (6e6, 0)]
    assert {event["name"] for event in events if event["ph"] == "C"} == {
        "KV blocks used",
        "requests running",
        "requests waiting",
        "tokens per step",
    }


def test_preemptions_and_rejections_are_instants_with_their_numbers(run: Run, tmp_path: Path) -> None:
    events = [event for event in load(run, tmp_path)["traceEvents"] if event["ph"] == "i"]
    assert [(event["name"], event["pid"], event["tid"], event["ts"]) for event in events] == [
        ("preemption", 1, 1, 1e6),
        ("preemption", 2, 1, 1e6),
        ("rejection", 1, 2, 3.5e6),
    ]
    assert events[0]["args"] == {
        "request": 0,
        "mode": "swap",
        "step": 2,
        "num_computed_tokens": 4,
        "num_used_before": 10,
        "num_used_after": 8,
    }
    assert events[2]["args"]["reason"].startswith("100 prompt")


def test_requests_that_overlap_are_in_lanes_of_their_own(long_run: Run, tmp_path: Path) -> None:
    document = load(long_run, tmp_path)
    assert [(name, lane) for name, lane, _, _ in spans(document) if name == "request"] == [
        ("request", 1),
        ("request", 2),
    ]
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "thread_name"]
    assert names == ["preemptions", "rejections", "lane 1", "lane 2"]


def test_spans_in_a_lane_nest(long_run: Run, tmp_path: Path) -> None:
    long_run.requests.admitted_s[1] = 1 / 3
    long_run.requests.first_token_s[1] = 2 / 3
    found = spans(load(long_run, tmp_path))
    (parent,) = [(start, start + length) for name, lane, start, length in found if (name, lane) == ("request", 2)]
    parts = sorted((start, length) for name, lane, start, length in found if lane == 2 and name != "request")
    ends = [round(start + length, 3) for start, length in parts]
    assert [start for start, _ in parts] == [parent[0], *ends[:-1]]
    assert ends[-1] == parent[1]


def test_what_is_left_out_is_counted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(run, tmp_path)["otherData"]["requests_left_out"] == 0
    monkeypatch.setattr(perfetto, "MAX_SHOWN", 1)
    run.preemptions.extend(run.preemptions)
    document = load(run, tmp_path)
    about = document["otherData"]
    assert (about["requests_shown"], about["requests_left_out"], about["preemptions_left_out"]) == (1, 1, 1)
    assert len([span for span in spans(document) if span[0] == "request"]) == 1
    assert len([event for event in document["traceEvents"] if (event["name"], event["pid"]) == ("preemption", 1)]) == 1


def test_long_runs_have_the_maximum_of_each_interval(long_run: Run, tmp_path: Path) -> None:
    document = load(long_run, tmp_path)
    points = [event for event in document["traceEvents"] if event["name"] == "KV blocks used"]
    assert document["otherData"]["counter_points"] == "maximum of each 0.00120024 s"
    assert len(points) <= perfetto.MAX_POINTS
    assert max(event["args"]["value"] for event in points) == 2


def test_names_from_outside_are_escaped(run: Run, tmp_path: Path) -> None:
    run.rejections[2] = 'a "quoted"\nreason ↯'
    events = load(run, tmp_path)["traceEvents"]
    assert [event["args"]["reason"] for event in events if event["name"] == "rejection"] == ['a "quoted"\nreason ↯']
