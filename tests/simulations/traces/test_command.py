from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pagedkv.simulations.traces import load_trace, sample_trace
from pagedkv.simulations.traces.command import app

PLAIN = "arrival_s,prompt_tokens,output_tokens\n0,1,1\n2,3,4\n"
# The options in docs/traces.md that make the sample.
SAMPLE_OPTIONS = (
    "--num-requests 400 --seed 7 --rate 3.4 --burstiness 1.5 --prompt-median 400 --prompt-max 4096 --output-median 120 "
    "--output-max 1024 --num-prefixes 4 --prefix-tokens 256 --prefix-share 0.7 --num-clients 3"
)


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    path = tmp_path / "two.csv"
    path.write_text(PLAIN)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_list_shows_the_traces_in_a_folder_and_nothing_else(trace_path: Path) -> None:
    (trace_path.parent / "notes.csv").write_text("a,b\n1,2\n")
    (trace_path.parent / "other.txt").write_text(PLAIN)
    result = run("list", trace_path.parent, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == [{"file": "two.csv", "format": "csv", "bytes": len(PLAIN)}]
    table = run("list", trace_path.parent).stdout
    assert "two.csv" in table
    assert "notes.csv" not in table


def test_list_says_so_where_there_are_none(tmp_path: Path) -> None:
    assert run("list", tmp_path).stdout == "no traces found\n"


def test_describe_prints_a_table_or_json(trace_path: Path) -> None:
    assert json.loads(run("describe", trace_path, "--json").stdout) == load_trace(trace_path).describe()
    table = run("describe", trace_path).stdout
    assert "num_requests" in table
    assert "prompt_tokens.p50" in table


def test_describe_prints_numbers_as_a_replay_does(trace_path: Path) -> None:
    trace_path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10000,1\n1800,21001,2\n3600,70000,3\n")

    shown = dict(re.findall(r"│ (\S+) +│ (.*?) +│", run("describe", trace_path).stdout))

    assert shown["span"] == "3,600 s"
    assert shown["prompt_tokens.p50"] == "21,001"
    assert shown["prompt_tokens.total"] == "101,001"
    assert shown["output_tokens.mean"] == "2.00"
    assert shown["num_clients"] == "-"


def test_describe_takes_a_head(trace_path: Path) -> None:
    assert json.loads(run("describe", trace_path, "--head", 1, "--json").stdout)["num_requests"] == 1


def test_convert_writes_an_equal_trace(trace_path: Path) -> None:
    out = trace_path.parent / "out.jsonl.gz"
    result = run("convert", trace_path, out)
    assert (result.exit_code, result.stdout.startswith(f"{out}: 2 requests, sha256 ")) == (0, True)
    assert load_trace(out).has_same_requests(load_trace(trace_path))


def test_generate_with_the_documented_options_makes_the_sample(tmp_path: Path) -> None:
    out = tmp_path / "sample.jsonl.gz"
    result = run("generate", out, *SAMPLE_OPTIONS.split())
    assert result.exit_code == 0
    assert load_trace(out).digest == sample_trace().digest


def test_the_documentation_has_these_options() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "traces.md"
    assert SAMPLE_OPTIONS in page.read_text().replace(" \\\n    ", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "none"),
        ("list", "two.csv"),
        ("describe", "none.csv"),
        ("describe", "."),
        ("describe", "two.csv", "--format", "parquet"),
        ("describe", "two.csv", "--session-gap", "1"),
        ("describe", "bad.csv"),
        ("convert", "two.csv", "out.parquet"),
        ("convert", "two.csv", "none/out.jsonl"),
        ("generate", "out.jsonl", "--rate", "0"),
        ("generate", "out.jsonl", "--prompt-sigma", "-1"),
        ("describe",),
        ("describe", "two.csv", "--head", "0"),
    ],
)
def test_a_mistake_ends_with_code_2_and_a_message_on_stderr(
    trace_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace_path.parent)
    (trace_path.parent / "bad.csv").write_text("a\n")
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--prefix-tokens", "--prefix-share", "--block-size"])
def test_an_option_of_prefixes_without_prefixes_is_refused(tmp_path: Path, option: str) -> None:
    result = run("generate", tmp_path / "out.jsonl", option, 2)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {option}: does nothing without --num-prefixes: give that, too\n"


def test_an_error_is_one_line_with_path_and_line_number(trace_path: Path) -> None:
    trace_path.write_text(PLAIN + "1,1,1\n")
    result = run("describe", trace_path)
    assert result.stderr == f"error: {trace_path}:4: expected arrivals in order (not before 2.0 s), found 1.0 s\n"
