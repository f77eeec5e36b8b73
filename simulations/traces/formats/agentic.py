"""Sessions of coding agents: one session on each line, its requests with content ids as runs `[[start, count], ...]`.

Source: callanjfox/kv-cache-tester, converted. An entry of type `subagent` holds requests of its own, whose times
count from that entry's. Ids are prefix ids of full blocks: a partial last block has none. With `hash_id_scope`
`local` they mean nothing outside their session, so each session's ids are moved to a range of its own; with `global`
they stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.checks import excerpt
from pagedkv.simulations.traces.columns import ColumnBuilder, agree_on_block_size, pack_runs, to_float64, to_int64
from pagedkv.simulations.traces.json_blocks import read_json
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["read_trace"]


class _Request(msgspec.Struct):
    t: float
    prompt_tokens: int = msgspec.field(name="in")
    output_tokens: int = msgspec.field(name="out")
    runs: list[tuple[int, int]]


class _Entry(msgspec.Struct):
    t: float
    type: str = "n"
    prompt_tokens: int | None = msgspec.field(name="in", default=None)
    output_tokens: int | None = msgspec.field(name="out", default=None)
    runs: list[tuple[int, int]] | None = None
    requests: list[_Request] | None = None


class _Session(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_Entry]
    hash_id_scope: Literal["local", "global"] = "local"


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:
    """Read agent sessions; session `i` starts at `i * session_gap_s`, and each session is a client.

    All sessions are merged by arrival, ties in file order. Times must not decrease within a session or a subagent.
    """
    builder = ColumnBuilder(source)
    names: dict[str, int] = {}
    block_size: int | None = None
    next_id = 0
    lines: list[int] = []
    sessions: list[int] = []
    arrivals: list[float] = []
    for block in read_json(source, _Session):
        for line, session in enumerate(block.rows, start=block.first_line):
            block_size = agree_on_block_size(source, line, session.block_size, block_size)
            if session.id in names:
                raise source.error(line, "a session id of its own", f"{excerpt(session.id)} again")
            start_s = len(names) * session_gap_s
            names[session.id] = len(names)
            timed = [(start_s + offset_s + request.t, request) for offset_s, request in _flatten(source, line, session)]
            arrivals += [arrival_s for arrival_s, _ in timed]
            lines += [line] * len(timed)
            first_id = next_id if session.hash_id_scope == "local" else 0
            end = _add_session(builder, line, timed, block_size, first_id)
            next_id = max(next_id, end)
            sessions += [names[session.id]] * len(timed)
    order = np.argsort(to_float64(arrivals), kind="stable")
    client_names = _add_clients(builder, np.array(sessions, dtype=np.int64), order, tuple(names))
    return builder.build(
        "agentic",
        line_of=lines.__getitem__,
        content_block_size=block_size,
        client_names=client_names,
        order=order,
        session_gap_s=session_gap_s,
    )


def _add_clients(
    builder: ColumnBuilder, sessions: npt.NDArray[np.int64], order: npt.NDArray[np.int64], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Number the sessions that have requests by their first arrival; return their names in that order."""
    present, first_arrivals = np.unique(sessions[order], return_index=True)
    by_arrival = present[np.argsort(first_arrivals)]
    number = np.empty(len(names), dtype=np.int64)
    number[by_arrival] = np.arange(len(by_arrival))
    builder.add_clients(number[sessions])
    return tuple(names[session] for session in by_arrival)


def _flatten(source: TraceSource, line: int, session: _Session) -> Iterator[tuple[float, _Request]]:
    """Yield the requests in file order, each with the time from which its own counts."""
    before = 0.0
    for entry in session.requests:
        _check_order(source, line, before, entry.t)
        before = entry.t
        if entry.type == "subagent":
            if entry.requests is None:
                raise source.error(line, "a key `requests` in a subagent", "none")
            before_nested = 0.0
            for request in entry.requests:
                _check_order(source, line, before_nested, request.t)
                before_nested = request.t
                yield entry.t, request
        else:
            if entry.prompt_tokens is None or entry.output_tokens is None or entry.runs is None:
                raise source.error(line, "the keys `in`, `out` and `runs` in a request", "not all of them")
            yield 0.0, _Request(entry.t, entry.prompt_tokens, entry.output_tokens, entry.runs)


def _check_order(source: TraceSource, line: int, before: float, after: float) -> None:
    if after < before:
        raise source.error(line, f"times in order within a session (not before {before} s)", f"{after} s")


def _add_session(
    builder: ColumnBuilder, line: int, timed: list[tuple[float, _Request]], block_size: int, first_id: int
) -> int:
    """Append the requests of one session, its ids moved by `first_id`; return the first id beyond all of them."""
    source = builder.source
    requests = [request for _, request in timed]
    runs = [run for request in requests for run in request.runs]
    end = first_id
    for start, count in runs:
        if start < 0 or not 1 <= count <= limits.MAX_TOKENS:
            raise source.error(line, "runs [start ≥ 0, count ≥ 1]", excerpt([start, count]))
        end = max(end, first_id + start + count)
    if end > limits.MAX_CONTENT_ID + 1:
        raise source.error(line, f"content ids of all sessions within {limits.MAX_CONTENT_ID}", excerpt(end - 1))
    for request in requests:
        num_ids = sum(count for _, count in request.runs)
        if num_ids != request.prompt_tokens // block_size:
            expected = f"runs of {request.prompt_tokens // block_size} ids for {request.prompt_tokens} tokens"
            raise source.error(line, f"{expected} in full blocks of {block_size}", str(num_ids))
    builder.add(
        line,
        to_float64([arrival_s for arrival_s, _ in timed]),
        to_int64(source, line, "in", [request.prompt_tokens for request in requests], lines_per_value=0),
        to_int64(source, line, "out", [request.output_tokens for request in requests], lines_per_value=0),
    )
    starts, counts, offsets = pack_runs(source, line, [request.runs for request in requests], lines_per_value=0)
    builder.add_runs(starts + first_id, counts, offsets)
    return end
