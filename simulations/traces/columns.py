"""Columns of a trace while a loader fills them, batch by batch, and the promise check that names a line at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.checks import excerpt, find_problem
from pagedkv.simulations.traces.content import encode_runs
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["ColumnBuilder", "agree_on_block_size", "pack_ids", "pack_runs", "to_float64", "to_int64"]


def to_int64(
    source: TraceSource, first_line: int, what: str, values: Sequence[int], *, lines_per_value: int = 1
) -> npt.NDArray[np.int64]:
    """Turn Python integers into a column; TraceError at the line of one beyond int64.

    Value `i` stands on line `first_line + i * lines_per_value`: with 0 all of them share one line.
    """
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        row = next(row for row, value in enumerate(values) if not -(2**63) <= value < 2**63)
        raise source.error(first_line + row * lines_per_value, f"{what} within 64 bits", excerpt(values[row])) from None


def to_float64(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Turn Python floats into a column."""
    return np.array(values, dtype=np.float64)


class ColumnBuilder:
    """Collects the columns of one file, batch by batch, and makes the trace."""

    __slots__ = ("_clients", "_columns", "_num_requests", "_priorities", "_runs", "source")

    def __init__(self, source: TraceSource) -> None:
        self.source = source
        self._num_requests = 0
        self._columns: tuple[list[npt.NDArray[Any]], ...] = ([], [], [])
        self._runs: tuple[list[npt.NDArray[np.int64]], ...] = ([], [], [])
        self._clients: list[npt.NDArray[np.int64]] = []
        self._priorities: list[npt.NDArray[np.float64]] = []

    def add(
        self,
        first_line: int,
        arrival_s: npt.NDArray[np.float64],
        prompt_tokens: npt.NDArray[np.int64],
        output_tokens: npt.NDArray[np.int64],
    ) -> None:
        """Append requests; TraceError at the first one too many."""
        self._num_requests += len(arrival_s)
        if self._num_requests > limits.MAX_REQUESTS:
            line = first_line + limits.MAX_REQUESTS - (self._num_requests - len(arrival_s))
            raise self.source.error(line, f"at most {limits.MAX_REQUESTS} requests", "one more")
        for parts, column in zip(self._columns, (arrival_s, prompt_tokens, output_tokens), strict=True):
            parts.append(column)

    def add_content_ids(self, first_line: int, ids_per_request: Sequence[Sequence[int]]) -> None:
        """Append the content ids of the same requests; TraceError at the line of an id beyond int64."""
        ids, offsets = pack_ids(self.source, first_line, ids_per_request)
        self.add_runs(*encode_runs(ids, offsets))

    def add_runs(
        self, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
    ) -> None:
        """Append the content ids of the same requests in run-length form; `offsets` starts at 0."""
        for parts, column in zip(self._runs, (starts, counts, np.diff(offsets)), strict=True):
            parts.append(column)

    def add_clients(self, clients: npt.NDArray[np.int64]) -> None:
        """Append the clients of the same requests."""
        self._clients.append(clients)

    def add_priorities(self, priorities: npt.NDArray[np.float64]) -> None:
        """Append the priorities of the same requests."""
        self._priorities.append(priorities)

    def build(
        self,
        format_name: str,
        *,
        line_of: Callable[[int], int],
        content_block_size: int | None = None,
        client_names: tuple[str, ...] = (),
        order: npt.NDArray[np.int64] | None = None,
        session_gap_s: float | None = None,
    ) -> Trace:
        """Make the trace and check its promises; TraceError at the line of the first request that breaks one.

        `line_of` maps an index in the order added to its physical line. `order`, where given, lists those indices in
        the order wanted.
        """
        if not self._num_requests:
            raise self.source.error(None, "at least one request", "none")
        arrival_s, prompts, outputs = (np.concatenate(parts) for parts in self._columns)
        starts, counts, lengths = (np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in self._runs)
        if not self._runs[2]:
            lengths = np.zeros(self._num_requests, dtype=np.int64)
        clients = np.concatenate(self._clients) if self._clients else None
        priorities = np.concatenate(self._priorities) if self._priorities else None
        if order is not None:
            runs = _runs_in_order(lengths, order)
            arrival_s, prompts, outputs, lengths = arrival_s[order], prompts[order], outputs[order], lengths[order]
            starts, counts = starts[runs], counts[runs]
            clients = None if clients is None else clients[order]
            priorities = None if priorities is None else priorities[order]
        trace = Trace.from_arrays(
            name=self.source.name,
            format=format_name,
            digest=self.source.digest,
            arrival_s=arrival_s,
            prompt_tokens=prompts,
            output_tokens=outputs,
            clients=clients,
            client_names=client_names,
            content_block_size=content_block_size,
            run_starts=starts,
            run_counts=counts,
            run_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            priorities=priorities,
            session_gap_s=session_gap_s,
        )
        problem = find_problem(trace)
        if problem is not None:
            index = problem.request if order is None else int(order[problem.request])
            raise self.source.error(line_of(index), problem.expected, problem.found)
        return trace


def pack_ids(
    source: TraceSource, first_line: int, ids_per_request: Sequence[Sequence[int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pack lists of ids into one array and its (n + 1,) offsets; TraceError at the line of an id beyond int64."""
    offsets = np.zeros(len(ids_per_request) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in ids_per_request], out=offsets[1:])
    try:
        return np.fromiter(chain.from_iterable(ids_per_request), dtype=np.int64, count=int(offsets[-1])), offsets
    except OverflowError:
        row, value = next((r, i) for r, ids in enumerate(ids_per_request) for i in ids if not -(2**63) <= i < 2**63)
        raise source.error(first_line + row, "content ids within 64 bits", excerpt(value)) from None


def pack_runs(
    source: TraceSource,
    first_line: int,
    runs_per_request: Sequence[Sequence[tuple[int, int]]],
    *,
    lines_per_value: int = 1,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pack lists of `(start, count)` into starts, counts, offsets; TraceError at the line of a number beyond int64."""
    offsets = np.zeros(len(runs_per_request) + 1, dtype=np.int64)
    np.cumsum([len(runs) for runs in runs_per_request], out=offsets[1:])
    numbers = chain.from_iterable(chain.from_iterable(runs_per_request))
    try:
        pairs = np.fromiter(numbers, dtype=np.int64, count=2 * int(offsets[-1])).reshape(-1, 2)
    except OverflowError:
        for row, runs in enumerate(runs_per_request):
            to_int64(source, first_line + row * lines_per_value, "runs", [*chain(*runs)], lines_per_value=0)
        raise
    return pairs[:, 0].copy(), pairs[:, 1].copy(), offsets


def agree_on_block_size(source: TraceSource, line: int, size: int, before: int | None) -> int:
    """Return the block size that this line gives; TraceError if it is out of range or differs from the lines before."""
    if before is not None and size != before:
        raise source.error(line, f"the block size {before} of the lines before", excerpt(size))
    if not 1 <= size <= limits.MAX_CONTENT_BLOCK_SIZE:
        raise source.error(line, f"a block size of 1 to {limits.MAX_CONTENT_BLOCK_SIZE}", excerpt(size))
    return size


def _runs_in_order(lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the indices of all runs, request after request in this order."""
    first_runs = np.cumsum(lengths) - lengths
    wanted = lengths[order]
    before = np.cumsum(wanted) - wanted
    return np.repeat(first_runs[order] - before, wanted) + np.arange(int(wanted.sum()), dtype=np.int64)
