from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.traces import Trace, load_trace, write_trace


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    num_requests = draw(st.integers(1, 8))
    column = st.lists(st.integers(1, 2**24), min_size=num_requests, max_size=num_requests)
    arrivals = st.lists(st.floats(0, 1e9), min_size=num_requests, max_size=num_requests)
    client = draw(st.sampled_from([None, st.integers(0, 2**62 - 1), st.text(max_size=4)]))
    clients = None if client is None else draw(st.lists(client, min_size=num_requests, max_size=num_requests))
    priorities = draw(st.none() | st.lists(st.floats(-1e9, 1e9), min_size=num_requests, max_size=num_requests))
    prompts = draw(column)
    block_size, runs = None, None
    if draw(st.booleans()):
        block_size, prompts = 4, [tokens % 40 + 1 for tokens in prompts]
        # Each request follows one of two chains of prefix ids, then goes its own way.
        runs = [_runs(draw, request, -(-tokens // 4)) for request, tokens in enumerate(prompts)]
    outputs = [tokens - 1 for tokens in draw(column)]
    return Trace.from_columns(
        sorted(draw(arrivals)),
        prompts,
        outputs,
        clients=clients,
        content_block_size=block_size,
        content_runs=runs,
        priorities=priorities,
    )


def _runs(draw: st.DrawFn, request: int, num_blocks: int) -> list[tuple[int, int]]:
    num_shared = draw(st.integers(0, num_blocks))
    chain = draw(st.sampled_from([0, 2**61]))
    runs = [(chain, num_shared), (1000 * (request + 1), num_blocks - num_shared)]
    return [(start, count) for start, count in runs if count]


@given(traces(), st.sampled_from(["trace.jsonl", "trace.jsonl.gz"]))
@settings(deadline=None)
def test_what_is_written_reads_back_equal(trace: Trace, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digest = write_trace(trace, Path(folder) / name)
        again = load_trace(Path(folder) / name)
    assert again.has_same_requests(trace)
    assert again.digest == digest == trace.digest


def test_a_row_names_only_what_is_known(tmp_path: Path) -> None:
    trace = Trace.from_columns([0, 0.25], [5, 1], [2, 0], content_block_size=4, content_runs=[[(0, 1), (7, 1)], []])
    write_trace(trace, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (
        '{"arrival_s":0.0,"prompt_tokens":5,"output_tokens":2,"hash_block_size":4,"hash_runs":[[0,1],[7,1]]}\n'
        '{"arrival_s":0.25,"prompt_tokens":1,"output_tokens":0}\n'
    )


def test_the_same_trace_gives_the_same_compressed_bytes_under_any_name(tmp_path: Path) -> None:
    trace = Trace.from_columns([0.0], [1], [1])
    write_trace(trace, tmp_path / "a.jsonl.gz")
    write_trace(trace, tmp_path / "b.jsonl.gz")
    written = (tmp_path / "a.jsonl.gz").read_bytes()
    assert written == (tmp_path / "b.jsonl.gz").read_bytes()
    assert written[4:8] == bytes(4)  # The time stamp of the gzip header.
    assert gzip.decompress(written) == b'{"arrival_s":0.0,"prompt_tokens":1,"output_tokens":1}\n'


def test_a_long_trace_is_written_in_chunks_that_keep_each_requests_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedkv.simulations.traces.writer._ROWS_PER_CHUNK", 2)
    runs = [[(0, 1)], [], [(0, 1), (5, 1)], [(9, 2)], []]
    trace = Trace.from_columns([0.0] * 5, [4, 4, 8, 8, 4], [1] * 5, content_block_size=4, content_runs=runs)
    write_trace(trace, tmp_path / "a.jsonl")
    assert load_trace(tmp_path / "a.jsonl").has_same_requests(trace)


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a name ending in"):
        write_trace(Trace.from_columns([0.0], [1], [1]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.jsonl"
    target.write_text("old")
    trace = Trace.from_columns([0.0], [1], [1])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pagedkv.simulations.traces.writer._rows", fail)
    with pytest.raises(OSError, match="disk full"):
        write_trace(trace, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
