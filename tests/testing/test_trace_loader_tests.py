"""Our own trace loader passes the tests that users run against theirs; loaders with known bugs do not."""

from __future__ import annotations

import gzip
import json
import zlib
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pagedkv.simulations.traces import Trace, limits, load_trace
from pagedkv.simulations.traces.checks import find_problem
from pagedkv.testing.trace_loader_tests import NUMBERS, TraceLoaderTests

CSV = b"arrival_s,client,prompt_tokens,output_tokens\n0.000000,13,13,199\n0.207938,2,36,137\n0.5,2,1,0\n"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,9\r\n"
BURSTGPT = (
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
)
JSONL = b"""\
{"arrival_s":0.5,"prompt_tokens":5,"output_tokens":2,"client":"a","hash_block_size":4,"hash_runs":[[0,2]]}
{"arrival_s":1,"prompt_tokens":5,"output_tokens":2,"client":"b","hash_block_size":4,"hash_runs":[[0,1],[7,1]]}
"""
MOONCAKE = b"""\
{"timestamp": 0, "input_length": 513, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1025, "output_length": 500, "hash_ids": [0, 1, 2]}
"""
AGENTIC = (
    b'{"id":"s","block_size":4,"hash_id_scope":"local","requests":[{"t":0.0,"in":9,"out":1,"runs":[[1,2]]},'
    b'{"t":2.0,"type":"subagent","requests":[{"t":0.5,"in":4,"out":0,"runs":[[8,1]]}]}]}\n'
)


class TestOurs(TraceLoaderTests):
    examples = (CSV, AZURE, BURSTGPT, JSONL, MOONCAKE, AGENTIC)

    def load(self, path: Path) -> Trace:
        return load_trace(path)

    def check(self, trace: Trace) -> None:
        assert find_problem(trace) is None

    def describe(self, trace: Trace) -> object:
        return (trace.digest, *self.describe_content(trace))

    def describe_content(self, trace: Trace) -> tuple[object, ...]:
        return (
            trace.arrival_s.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            trace.run_starts.tolist(),
        )

    def capped(self, num_bytes: int) -> AbstractContextManager[object]:
        patch = pytest.MonkeyPatch.context()

        class Cap(AbstractContextManager[object]):
            def __enter__(self) -> object:
                context = patch.__enter__()
                context.setattr(limits, "MAX_DECOMPRESSED_BYTES", num_bytes)
                return context

            def __exit__(self, *error: object) -> None:
                patch.__exit__(*error)

        return Cap()


class Naive(TraceLoaderTests):
    """A loader as one writes it in a minute."""

    examples = (b'{"t":0,"prompt":4,"output":2}\n{"t":1,"prompt":5,"output":3}\n',)
    errors = (ValueError,)

    def load(self, path: Path) -> list[tuple[float, int, int]]:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        records = [json.loads(line) for line in text.splitlines()]
        if not records:
            raise ValueError("an empty file")
        return [(record["t"], record["prompt"], record["output"]) for record in records]

    def check(self, trace: list[tuple[float, int, int]]) -> None:
        times = [t for t, _, _ in trace]
        assert times == sorted(times)
        assert all(isinstance(number, int) and 0 <= number < 2**63 for _, *counts in trace for number in counts)

    def capped(self, num_bytes: int) -> AbstractContextManager[object]:
        return memoryview(b"")  # A context that lowers nothing: there is no cap.


@pytest.mark.parametrize(
    ("test", "arguments", "error"),
    [
        ("test_any_number_may_be_something_else", ("-1",), AssertionError),
        ("test_any_number_may_be_something_else", ("NaN",), AssertionError),
        ("test_any_number_may_be_something_else", ("9223372036854775808",), AssertionError),
        ("test_any_number_may_be_something_else", ("null",), (AssertionError, TypeError)),
        ("test_lines_may_be_anything", (), (KeyError, AssertionError, TypeError)),
        ("test_nesting_may_be_deep", (), RecursionError),
        ("test_no_file_may_be_an_error_of_another_kind", (), OSError),
        ("test_damaged_compressed_files_are_refused", (), (EOFError, OSError, zlib.error)),
        ("test_a_decompression_bomb_is_refused_before_it_goes_off", (), AssertionError),
    ],
)
def test_a_naive_loader_fails(test: str, arguments: tuple[str, ...], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        getattr(Naive(), test)(*arguments, tmp_path)


def test_numbers_of_all_kinds_are_tried() -> None:
    assert {str(2**63), str(2**64), str(2**70), "NaN", "-1", "inf"} <= set(NUMBERS)


def test_a_class_without_examples_says_what_to_supply(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="examples"):
        TraceLoaderTests().test_examples_are_loaded(tmp_path)
