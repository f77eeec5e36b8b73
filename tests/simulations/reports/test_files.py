"""summary.json, requests.csv, and the folder as a whole."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.reports import write_reports
from pagedkv.simulations.reports.requests_csv import write_requests
from pagedkv.simulations.reports.summary_json import write_summary
from pagedkv.simulations.run import Run


def load(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_summary_has_the_figures_the_trace_and_the_configuration(run: Run, tmp_path: Path) -> None:
    summary = summarize(run)
    document = load(write_summary(run, summary, tmp_path / "summary.json"))
    assert document.pop("trace") == {"name": "three", "format": "generated", "digest": run.trace.digest}
    assert document.pop("configuration") == run.configuration
    assert document == summary


def test_what_json_cannot_say_is_null(run: Run, tmp_path: Path) -> None:
    run.configuration["limits"] = [float("inf"), {"low": float("nan"), "high": 1e-300}]
    document = load(write_summary(run, summarize(run), tmp_path / "summary.json"))
    assert document["configuration"]["limits"] == [None, {"low": None, "high": 1e-300}]


def test_every_request_has_its_line(run: Run, tmp_path: Path) -> None:
    path = write_requests(run, tmp_path / "requests.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "request": "0",
        "client": "a",
        "arrival_s": "0.0",
        "prompt_tokens": "4",
        "output_tokens": "2",
        "generated_tokens": "2",
        "prefix_hit_tokens": "0",
        "admitted_s": "0.0",
        "first_token_s": "1.0",
        "finished_s": "2.0",
        "queue_s": "0.0",
        "ttft_s": "1.0",
        "tpot_s": "1.0",
        "e2e_s": "2.0",
        "num_preemptions": "1",
        "status": "finished",
        "reason": "",
    }
    assert (rows[1]["client"], rows[1]["ttft_s"], rows[1]["tpot_s"], rows[1]["status"]) == ("b", "2.5", "", "finished")
    assert (rows[2]["finished_s"], rows[2]["queue_s"], rows[2]["status"]) == ("", "", "rejected")
    assert rows[2]["reason"] == "100 prompt + 5 new tokens need 26 blocks of 4, the pool has 10"
    assert len(rows) == 3


def test_floats_in_the_csv_round_trip(run: Run, tmp_path: Path) -> None:
    run.requests.finished_s[0] = 2.0 + 2**-40
    path = write_requests(run, tmp_path / "requests.csv")
    with path.open(newline="") as file:
        assert float(next(csv.DictReader(file))["finished_s"]) == 2.0 + 2**-40


def test_a_client_name_cannot_break_the_csv(run_maker: Callable[..., Run], tmp_path: Path) -> None:
    path = write_requests(run_maker(client='x,"y\nz'), tmp_path / "requests.csv")
    with path.open(newline="") as file:
        assert [row["client"] for row in csv.DictReader(file)] == ["a", 'x,"y\nz', "a"]


def test_a_request_that_never_ended_is_unfinished(run: Run, tmp_path: Path) -> None:
    run.requests.finished_s[1] = np.nan
    path = write_requests(run, tmp_path / "requests.csv")
    assert path.read_text().splitlines()[2].endswith(",unfinished,")


def test_all_reports_are_written_into_a_new_folder(run: Run, tmp_path: Path) -> None:
    paths = write_reports(run, tmp_path / "new" / "folder")
    assert {key: path.name for key, path in paths.items()} == {
        "summary": "summary.json",
        "requests": "requests.csv",
        "page": "report.html",
        "perfetto": "trace.perfetto.json",
    }
    assert all(path.is_file() for path in paths.values())


def test_a_run_without_a_step_has_all_reports_too(rejected_run: Run, tmp_path: Path) -> None:
    paths = write_reports(rejected_run, tmp_path)
    assert load(paths["summary"])["num_rejected"] == 1
    assert load(paths["perfetto"])["otherData"]["requests_shown"] == 0


def test_a_file_in_the_way_is_the_callers_mistake(run: Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for folder in (taken, taken / "below"):
        with pytest.raises(InvalidArgumentError, match="expected a folder, found a file"):
            write_reports(run, folder)
    assert taken.read_text() == "mine"


def test_two_runs_of_the_same_thing_differ_in_wall_clock_times_only(
    run_maker: Callable[..., Run], tmp_path: Path
) -> None:
    fast, slow = (write_reports(run_maker(wall_s=wall_s), tmp_path / str(wall_s)) for wall_s in (0.5, 2.0))

    def rest(path: Path) -> str:
        text = re.sub(r'"(wall_s|requests_per_wall_s)": [0-9.]+', "", path.read_text())
        return re.sub(r'<footer id="wall-clock">.*?</footer>', "", text)

    assert fast["summary"].read_text() != slow["summary"].read_text()
    assert {key for key in fast if rest(fast[key]) != rest(slow[key])} == set()
    assert fast["requests"].read_bytes() == slow["requests"].read_bytes()
    assert fast["perfetto"].read_bytes() == slow["perfetto"].read_bytes()


def test_every_key_of_the_summary_and_column_of_the_csv_is_documented(run: Run, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    keys = load(write_summary(run, summarize(run), tmp_path / "summary.json"))
    columns = write_requests(run, tmp_path / "requests.csv").read_text().splitlines()[0].split(",")
    assert [name for name in (*keys, *columns) if f"`{name}`" not in page] == []
