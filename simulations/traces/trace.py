"""A request trace in columns: arrivals, lengths, clients, and which prompt blocks the requests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.traces.checks import excerpt, find_problem
from pagedkv.simulations.traces.content import expand_runs, merge_runs

__all__ = ["Trace", "number_names"]

_COLUMNS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "clients",
    "run_starts",
    "run_counts",
    "run_offsets",
    "priorities",
)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A request trace; `load_trace`, `generate_trace` and `Trace.from_columns` make one and keep these promises.

    name:               file name without `.gz`, `.csv`, `.jsonl`; a head of 100 requests adds `[:100]`
    format:             the format it was read from, one of `TRACE_FORMATS`, or `generated`
    digest:             SHA-256 (hex) of the decompressed source; of the plain JSONL form where there is no source
    arrival_s:          (n,) float64, seconds, non-decreasing, from 0 to 1e9; ties are served in index order
    prompt_tokens:      (n,) int64, from 1 to 2**24
    output_tokens:      (n,) int64, from 0 to 2**24; 0 is a prefill-only request (or one that failed at the source)
    clients:            (n,) int64 ≥ 0, or None; an index into `client_names` where the source names its clients
    client_names:       in order of first appearance; empty where clients are plain integers
    content_block_size: tokens that one content id names, or None where the trace has no content ids
    run_starts:         (num_runs,) int64, first id of each run
    run_counts:         (num_runs,) int64, ids in each run
    run_offsets:        (n + 1,) int64; request `i` owns runs `run_offsets[i]:run_offsets[i + 1]`
    priorities:         (n,) float64, finite, lower goes first; None where all are 0
    session_gap_s:      seconds between the starts of sessions, where the source holds sessions; else None

    Content ids are *prefix ids*: equal id means equal block and equal prompt up to there. A request has either none,
    one per full block, or one per block with the last naming a partial block. They stay in run-length form: a trace
    of agent sessions has 94 million of them in 165 thousand runs. n ≥ 1; all arrays are read-only.
    """

    name: str
    format: str
    digest: str
    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    clients: npt.NDArray[np.int64] | None
    client_names: tuple[str, ...]
    content_block_size: int | None
    run_starts: npt.NDArray[np.int64]
    run_counts: npt.NDArray[np.int64]
    run_offsets: npt.NDArray[np.int64]
    priorities: npt.NDArray[np.float64] | None = None
    session_gap_s: float | None = None

    def __post_init__(self) -> None:
        for column in _COLUMNS:
            array = getattr(self, column)
            if array is not None:
                array.setflags(write=False)

    @classmethod
    def from_columns(
        cls,
        arrival_s: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        *,
        clients: npt.ArrayLike | Sequence[str] | None = None,
        content_block_size: int | None = None,
        content_runs: Sequence[Sequence[tuple[int, int]]] | None = None,
        priorities: npt.ArrayLike | None = None,
        name: str = "columns",
    ) -> Trace:
        """Build a trace from columns of your own, copied.

        clients:      integers, or names, which are numbered in order of first appearance
        content_runs: for each request its `(start, count)` runs of content ids
        priorities:   numbers, lower goes first

        Raises InvalidArgumentError, naming the request, for anything that contradicts the promises of the class.

        >>> runs = [[(0, 1)], [(0, 2)]]
        >>> trace = Trace.from_columns([0.0, 0.5], [4, 6], [1, 2], content_block_size=4, content_runs=runs)
        >>> trace.content_ids(1).tolist()
        [0, 1]
        """
        arrivals = _to_column(arrival_s, np.float64, "arrival_s")
        num_requests = len(arrivals)
        numbers, client_names = _number_clients(clients)
        runs = [list(request) for request in content_runs] if content_runs is not None else [[]] * num_requests
        flat = [run for request in runs for run in request]
        if any(len(run) != 2 for run in flat):
            raise InvalidArgumentError("content_runs: expected (start, count) pairs")
        trace = cls.from_arrays(
            name=name,
            format="generated",
            digest="",
            arrival_s=arrivals,
            prompt_tokens=_to_column(prompt_tokens, np.int64, "prompt_tokens"),
            output_tokens=_to_column(output_tokens, np.int64, "output_tokens"),
            clients=numbers,
            client_names=client_names,
            content_block_size=content_block_size,
            run_starts=_to_column([start for start, _ in flat], np.int64, "content_runs"),
            run_counts=_to_column([count for _, count in flat], np.int64, "content_runs"),
            run_offsets=np.cumsum([0, *map(len, runs)], dtype=np.int64),
            priorities=None if priorities is None else _to_column(priorities, np.float64, "priorities"),
        )
        problem = find_problem(trace)
        if problem is not None:
            raise InvalidArgumentError(f"request {problem.request}: expected {problem.expected}, found {problem.found}")
        return trace.with_own_digest()

    @classmethod
    def from_arrays(cls, **columns: Any) -> Trace:
        """Assemble the fields with consistent shapes and merged runs; their values are for `find_problem` to check.

        Raises InvalidArgumentError for shapes that contradict each other, or no request at all.
        """
        num_requests = len(columns["arrival_s"])
        if num_requests == 0:
            raise InvalidArgumentError("a trace has at least one request")
        priorities = columns.setdefault("priorities", None)
        for column in ("prompt_tokens", "output_tokens", "clients", "priorities"):
            if columns[column] is not None and len(columns[column]) != num_requests:
                raise InvalidArgumentError(f"{column}: expected {num_requests} values, found {len(columns[column])}")
        if len(columns["run_offsets"]) != num_requests + 1:
            found = len(columns["run_offsets"]) - 1
            raise InvalidArgumentError(
                f"content runs: expected one list for each of {num_requests} requests, found {found}"
            )
        merged = merge_runs(columns["run_starts"], columns["run_counts"], columns["run_offsets"])
        columns["run_starts"], columns["run_counts"], columns["run_offsets"] = merged
        # No ids at all is one thing, with or without a block size.
        columns["content_block_size"] = columns["content_block_size"] if len(merged[0]) else None
        # Nor are priorities that are all 0 anything but none.
        columns["priorities"] = priorities if priorities is not None and np.any(priorities) else None
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, {self.format}, {len(self)} requests)"

    def content_ids(self, request: int) -> npt.NDArray[np.int64]:
        """Return the content ids of one request's prompt, front to back; empty if it has none. O(ids).

        Raises InvalidArgumentError unless 0 ≤ request < len(self).
        """
        if not 0 <= request < len(self):
            raise InvalidArgumentError(f"request {request}: expected an index from 0 to {len(self) - 1}")
        runs = slice(int(self.run_offsets[request]), int(self.run_offsets[request + 1]))
        return expand_runs(self.run_starts[runs], self.run_counts[runs])

    def num_content_ids(self) -> npt.NDArray[np.int64]:
        """Return how many content ids each request has, (n,) int64. O(num_runs)."""
        before = np.zeros(len(self.run_counts) + 1, dtype=np.int64)
        np.cumsum(self.run_counts, out=before[1:])
        return np.diff(before[self.run_offsets])

    def head(self, num_requests: int) -> Trace:
        """Return the first requests, or the trace itself if it has no more than that.

        The digest stays that of the source; the name gets the suffix `[:num_requests]`, so that the two together
        identify what was replayed. Raises InvalidArgumentError if `num_requests` < 1. O(num_requests).
        """
        if num_requests < 1:
            raise InvalidArgumentError(f"num_requests: expected 1 or more, found {num_requests}")
        if num_requests >= len(self):
            return self
        num_runs = int(self.run_offsets[num_requests])
        clients = None if self.clients is None else self.clients[:num_requests]
        num_names = 0 if clients is None or not self.client_names else int(clients.max()) + 1
        return dataclasses.replace(
            self,
            name=f"{self.name}[:{num_requests}]",
            arrival_s=self.arrival_s[:num_requests],
            prompt_tokens=self.prompt_tokens[:num_requests],
            output_tokens=self.output_tokens[:num_requests],
            clients=clients,
            client_names=self.client_names[:num_names],
            content_block_size=self.content_block_size if num_runs else None,
            run_starts=self.run_starts[:num_runs],
            run_counts=self.run_counts[:num_runs],
            run_offsets=self.run_offsets[: num_requests + 1],
            priorities=None if self.priorities is None else self.priorities[:num_requests],
        )

    def has_same_requests(self, other: Trace) -> bool:
        """Tell whether all columns are equal, whatever the name, format and digest. O(n + num_runs)."""
        if (self.content_block_size, self.client_names) != (other.content_block_size, other.client_names):
            return False
        if (self.clients is None) != (other.clients is None):
            return False
        if (self.priorities is None) != (other.priorities is None):
            return False
        pairs = ((getattr(self, column), getattr(other, column)) for column in _COLUMNS)
        return all(mine is None or np.array_equal(mine, theirs) for mine, theirs in pairs)

    def with_own_digest(self) -> Trace:
        """Return the trace with the digest of its plain JSONL form: what `write_trace` would write. O(bytes)."""
        from pagedkv.simulations.traces.writer import digest_of

        return dataclasses.replace(self, digest=digest_of(self))

    def describe(self) -> dict[str, Any]:
        """Return the trace's statistics as plain numbers, ready for JSON; `describe_trace` documents the keys."""
        from pagedkv.simulations.traces.description import describe_trace

        return describe_trace(self)


def _to_column(values: npt.ArrayLike, dtype: type[np.generic], what: str) -> npt.NDArray[Any]:
    """Copy values into a one-dimensional array, refusing any conversion that would change one."""
    try:
        given = np.asarray(values)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError(f"{what}: expected numbers, found {excerpt(values)}") from None
    if given.ndim != 1:
        raise InvalidArgumentError(f"{what}: expected one dimension, found {given.ndim}")
    if not given.size:
        return np.zeros(0, dtype=dtype)
    if given.dtype.kind not in ("iuf" if dtype is np.float64 else "iu"):
        raise InvalidArgumentError(f"{what}: expected {dtype.__name__}, found {excerpt(values)}")
    if dtype is np.int64 and int(given.max()) >= 2**63:
        raise InvalidArgumentError(f"{what}: expected int64, found {given.max()}")
    return given.astype(dtype)


def number_names(names: Sequence[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Number names in order of first appearance; return one number for each, and the distinct names. O(n).

    >>> number_names(["b", "a", "b"])
    (array([0, 1, 0]), ('b', 'a'))
    """
    numbers: dict[str, int] = {}
    column = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(column, dtype=np.int64), tuple(numbers)


def _number_clients(
    clients: npt.ArrayLike | Sequence[str] | None,
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    if clients is None:
        return None, ()
    if not isinstance(clients, Sequence) or not all(isinstance(client, str) for client in clients) or not clients:
        return _to_column(clients, np.int64, "clients"), ()
    numbers, names = number_names([str(client) for client in clients])
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"clients: expected valid Unicode names, found {excerpt(error.object)}") from None
    return numbers, names
