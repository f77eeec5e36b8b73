from __future__ import annotations

import subprocess
import sys

import pytest

from pagedkv.errors import InvalidArgumentError

from .conftest import Load, LoadError

ONE = "arrival_s,prompt_tokens,output_tokens\n0,1,1\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a,b\n1,2\n", "the columns 'a, b'"),
        ("arrival_s,prompt_tokens\n0,1\n", "the columns 'arrival_s, prompt_tokens'"),
        ('{"a": 1}\n', "the keys 'a'"),
        ("[1]\n", "the columns '[1]'"),
        ("hello\n\nworld\n", "the columns 'hello'"),
    ],
)
def test_an_unknown_format_is_an_error_that_lists_the_known_ones(load_error: LoadError, text: str, found: str) -> None:
    message = load_error(text)
    assert message.startswith(
        "trace:1: expected the columns or keys of a known format (azure: TIMESTAMP, ContextTokens, "
    )
    assert "mooncake: timestamp, input_length, output_length, hash_ids)" in message
    assert message.endswith(f"found {found}")


def test_a_long_header_is_not_dumped(load_error: LoadError) -> None:
    assert load_error("x" * 10_000).endswith("found the columns '" + "x" * 56 + "...")


def test_a_format_by_name_says_what_is_missing(load_error: LoadError) -> None:
    expected = "trace:1: expected a column 'TIMESTAMP', found the columns 'arrival_s, prompt_tokens, output_tokens'"
    assert load_error(ONE, format="azure") == expected
    assert load_error(ONE, format="mooncake").startswith("trace:1: expected a JSON object (JSON is malformed")


def test_a_format_that_does_not_exist_is_the_callers_mistake(load: Load) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"format: expected one of azure, burstgpt, csv, .*, found 'parquet'"
    ):
        load(ONE, format="parquet")


@pytest.mark.parametrize("gap", [-1.0, float("nan"), float("inf")])
def test_a_gap_that_cannot_be_is_the_callers_mistake(load: Load, gap: float) -> None:
    with pytest.raises(InvalidArgumentError, match="session_gap_s: expected 0 to"):
        load(ONE, session_gap_s=gap)


def test_a_gap_for_a_trace_without_sessions_is_the_callers_mistake(load: Load) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a trace of sessions, found format csv"):
        load(ONE, session_gap_s=1.0)


def test_a_csv_trace_loads_without_msgspec_typer_or_rich(tmp_path: object) -> None:
    code = (
        "import sys; from pagedkv.simulations.traces import load_trace; load_trace(sys.argv[1]);"
        "print(sorted({'msgspec', 'typer', 'rich', 'torch'} & set(sys.modules)))"
    )
    path = f"{tmp_path}/trace"
    with open(path, "w") as file:  # noqa: PTH123
        file.write(ONE)
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
