"""Whatever a file holds, it is a valid trace or a TraceError of one line."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pagedkv.errors import TraceError
from pagedkv.simulations.traces import TRACE_FORMATS, load_trace
from pagedkv.simulations.traces.checks import find_problem

VALID = [
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,9\r\n",
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n",
    b"arrival_s,client,prompt_tokens,output_tokens\n0.000000,13,13,199\n0.207938,2,36,137\n",
    b'arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block_size\n0,5,1,"7 8",4\n1,9,1,7 9 10,4\n',
    (
        b'{"arrival_s":0.5,"prompt_tokens":5,"output_tokens":2,"client":"a","hash_block_size":4,"hash_runs":[[0,2]]}\n'
        b'{"arrival_s":1,"prompt_tokens":5,"output_tokens":2,"client":"b","hash_block_size":4,"hash_runs":[[0,1],[7,1]]}\n'
    ),
    (
        b'{"timestamp": 0, "input_length": 513, "output_length": 500, "hash_ids": [0, 1]}\n'
        b'{"timestamp": 3000, "input_length": 1025, "output_length": 500, "hash_ids": [0, 1, 2]}\n'
    ),
    (
        b'{"chat_id":1,"parent_chat_id":-1,"timestamp":0.1,"input_length":17,"output_length":2,"type":"text","turn":1,'
        b'"hash_ids":[5,6]}\n'
    ),
    (
        b'{"id":"s","block_size":4,"hash_id_scope":"local","requests":[{"t":0.0,"in":9,"out":1,"runs":[[1,2]]},'
        b'{"t":2.0,"type":"subagent","requests":[{"t":0.5,"in":4,"out":0,"runs":[[8,1]]}]}]}\n'
    ),
]
PIECES = [
    b"",
    b"0",
    b"-1",
    b"1.5",
    b"1e30",
    b"nan",
    b"99999999999999999999",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
]
PIECES += [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"\xef\xbb\xbf",
    b"null",
    b"true",
    b"4611686018427387904",
    b"9223372036854775807",
]


def check(content: bytes, format_name: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        path.write_bytes(content)
        try:
            trace = load_trace(path, format=format_name)
        except TraceError as error:
            message = str(error)
        else:
            assert find_problem(trace) is None
            trace.describe()
            message = ""
    assert "\n" not in message
    assert len(message) < len(folder) + 1000


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    content = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(begin + draw(st.integers(0, 12)), len(content))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=3))
        content = content[:begin] + piece + content[end:]
    return content


@pytest.mark.parametrize("content", VALID, ids=[content[:20].decode() for content in VALID])
def test_the_seeds_of_the_mutants_are_valid(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(content)
    assert find_problem(load_trace(tmp_path / "trace")) is None


@given(mutants())
@example(b"\r0")
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_trace_is_a_trace_or_a_trace_error(content: bytes) -> None:
    check(content)


@given(st.binary(max_size=200), st.sampled_from([None, *(known.name for known in TRACE_FORMATS)]))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_a_trace_error_in_any_format(content: bytes, format_name: str | None) -> None:
    check(content, format_name)


@given(mutants(), st.integers(0, 200), st.binary(min_size=1, max_size=2))
@settings(max_examples=200, deadline=None)
def test_damaged_gzip_is_a_trace_or_a_trace_error(content: bytes, position: int, piece: bytes) -> None:
    packed = gzip.compress(content, mtime=0)
    check(packed[:position] + piece + packed[position + len(piece) :])


@given(mutants(), st.sampled_from([known.name for known in TRACE_FORMATS]))
@settings(max_examples=200, deadline=None)
def test_a_mutant_read_as_another_format_is_a_trace_or_a_trace_error(content: bytes, format_name: str) -> None:
    check(content, format_name)
