"""Read what `pagedkv.engine.run_record` wrote: the configuration, the steps and the requests of a real run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pagedkv import CacheConfig, CacheIdentity, TraceError
from pagedkv.eviction import make_policy
from pagedkv.scheduler import (
    FCFS,
    Cheaper,
    FinishReason,
    LatestArrival,
    LowestPriority,
    PreemptionPolicy,
    Priority,
    QueuePolicy,
    Recompute,
    SchedulerConfig,
    Swap,
    VictimPolicy,
)
from pagedkv.simulations.cost_models import StepLoad
from pagedkv.simulations.traces import Trace
from pagedkv.simulations.traces.checks import excerpt
from pagedkv.simulations.traces.csv_blocks import read_csv
from pagedkv.simulations.traces.formats.plain_jsonl import read_trace
from pagedkv.simulations.traces.json_blocks import read_json
from pagedkv.simulations.traces.limits import MAX_LINE_BYTES, MAX_TOKENS
from pagedkv.simulations.traces.source import TraceSource

__all__ = ["RecordedRequests", "RecordedSteps", "RunHeader", "RunRecord", "read_header", "read_run", "read_steps"]

VERSION = 1
MAX_SAMPLES = 1024
MAX_HEADER_BYTES = 2**20
OWN_ENDS = (FinishReason.LENGTH, FinishReason.STOP)
ROLES: dict[str, tuple[Any, ...]] = {
    "policy": (FCFS, Priority),
    "victim": (LatestArrival, LowestPriority),
    "preemption": (Recompute, Swap, Cheaper),
}
COUNT_COLUMNS = (*StepLoad._fields, "num_waiting", "num_used_blocks")


@dataclass(frozen=True, slots=True, eq=False)
class RunHeader:
    """What `run.json` says: the configuration that the engine ran with.

    model:       facts about model and machine, for people
    is_complete: whether the recorder was closed; if not, the run was cut off and its last lines may be missing
    """

    model: dict[str, Any]
    cache: CacheConfig
    eviction: str
    scheduler: SchedulerConfig
    policy: QueuePolicy
    victim: VictimPolicy
    preemption: PreemptionPolicy
    is_complete: bool


@dataclass(frozen=True, slots=True, eq=False)
class RecordedSteps:
    """Columns over the run's steps, (k,) each.

    start_s, end_s: seconds of the run
    load:           the work of each step, (k,) int64 in every field
    num_waiting, num_used_blocks: while the step ran
    """

    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    load: StepLoad
    num_waiting: NDArray[np.int64]
    num_used_blocks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRequests:
    """What happened to the requests of the trace, in its order: (n,) each, and flat (samples,) for their samples.

    first_token_s:   NaN where no token came
    end_s:           end of the last sample
    num_preemptions: over all samples
    is_aborted:      whether a sample was ended from outside, by its user or an error
    max_new_tokens, priority, reads_cache: as the request had them
    num_samples:     samples of each request
    sample_tokens:   (samples,) tokens that each sample got, request after request
    has_stopped:     (samples,) whether it ended otherwise than by having all its tokens
    """

    first_token_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    num_preemptions: NDArray[np.int64]
    is_aborted: NDArray[np.bool_]
    max_new_tokens: NDArray[np.int64]
    priority: NDArray[np.float64]
    reads_cache: NDArray[np.bool_]
    num_samples: NDArray[np.int64]
    sample_tokens: NDArray[np.int64]
    has_stopped: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """A recorded run. `trace.output_tokens` is the length of each request's longest sample."""

    folder: Path
    header: RunHeader
    trace: Trace
    requests: RecordedRequests
    steps: RecordedSteps


class _Sample(msgspec.Struct):
    reason: str
    first_token_s: float | None
    end_s: float
    num_output_tokens: int
    num_preemptions: int


class _Request(msgspec.Struct):
    arrival_s: float
    output_tokens: int
    max_new_tokens: int
    priority: float
    reads_cache: bool
    samples: list[_Sample]


class _CutSource(TraceSource):
    """The complete lines of a file that may end in the middle of one."""

    __slots__ = ()

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        carry = b""
        for chunk in super()._chunks(file):
            lines, newline, carry = (carry + chunk).rpartition(b"\n") if chunk else (b"", b"", b"")
            if newline or not chunk:
                yield lines + newline
            if len(carry) > MAX_LINE_BYTES:
                yield carry  # The caller refuses so long a line.


def read_run(folder: str | Path) -> RunRecord:
    """Read a recorded run. O(bytes).

    Raises TraceError, one line with path and line number, for anything that is not a record. Of a run that was cut off,
    an incomplete last line is left out.
    """
    folder = Path(folder)
    header = read_header(folder)
    path = folder / "trace.jsonl"
    trace = read_trace(_source(path, header), session_gap_s=0.0)
    return RunRecord(folder, header, trace, _read_requests(_source(path, header)), read_steps(folder, header))


def read_header(folder: str | Path) -> RunHeader:
    """Read `run.json` of a recorded run. Raises TraceError."""
    path = Path(folder) / "run.json"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise TraceError(f"{folder}: expected the folder of a recorded run, found no run.json") from None
    except OSError as error:
        raise TraceError(f"{path}: expected a readable file, found {error.strerror}") from None
    if len(raw) > MAX_HEADER_BYTES:
        raise TraceError(f"{path}: expected at most {MAX_HEADER_BYTES} bytes, found more")
    try:
        fields = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise TraceError(f"{path}: expected JSON, found something else") from None
    version = fields.get("pagedkv_run") if isinstance(fields, dict) else None
    if version != VERSION:
        raise TraceError(f"{path}: expected a recorded run of version {VERSION}, found {excerpt(version)}")
    try:
        return _header_of(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TraceError(f"{path}: expected the configuration of an engine, found {excerpt(str(error))}") from None


def _header_of(fields: dict[str, Any]) -> RunHeader:
    cache = CacheConfig(**{**fields["cache"], "identity": CacheIdentity(**fields["cache"]["identity"])})
    make_policy(fields["eviction"], 1)  # Raises for a name that it does not know.
    policies: dict[str, Any] = {}
    for role, known in ROLES.items():
        parameters = dict(fields[role])
        name = parameters.pop("name")
        policies[role] = {policy.__name__: policy for policy in known}[name](**parameters)
    return RunHeader(
        model=dict(fields["model"]),
        cache=cache,
        eviction=fields["eviction"],
        scheduler=SchedulerConfig(**fields["scheduler"]),
        is_complete=fields["is_complete"] is True,
        **policies,
    )


def read_steps(folder: str | Path, header: RunHeader) -> RecordedSteps:
    """Read `steps.csv` of a recorded run; at least one step. Raises TraceError. O(steps)."""
    source = _source(Path(folder) / "steps.csv", header)
    times: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    counts: list[list[NDArray[np.int64]]] = []
    for block in read_csv(source, ("start_s", "end_s", *COUNT_COLUMNS)):
        start_s, end_s = block.numbers("start_s"), block.numbers("end_s")
        is_bad = ~((start_s >= 0) & (end_s > start_s) & (end_s < math.inf))
        if is_bad.any():
            row = int(is_bad.argmax())
            found = f"{start_s[row]} to {end_s[row]} s"
            raise source.error(block.first_line + row, "a step that begins in the run and ends later", found)
        columns = [block.integers(name) for name in COUNT_COLUMNS]
        for name, column in zip(COUNT_COLUMNS, columns, strict=True):
            least = 1 if name in ("num_rows", "num_tokens") else 0
            if column.min() < least:
                row = int((column < least).argmax())
                raise source.error(block.first_line + row, f"{name} of at least {least}", str(column[row]))
        times.append((start_s, end_s))
        counts.append(columns)
    if not times:
        raise source.error(None, "at least one step", "none")
    start_s, end_s = (np.concatenate(parts) for parts in zip(*times, strict=True))
    *load, num_waiting, num_used = (np.concatenate(parts) for parts in zip(*counts, strict=True))
    return RecordedSteps(start_s, end_s, StepLoad(*load), num_waiting, num_used)


def _read_requests(source: TraceSource) -> RecordedRequests:
    rows: list[_Request] = []
    for block in read_json(source, _Request):
        for line, row in enumerate(block.rows, start=block.first_line):
            _check(source, line, row)
        rows += block.rows
    samples = [row.samples for row in rows]
    firsts = [[sample.first_token_s for sample in group if sample.first_token_s is not None] for group in samples]
    return RecordedRequests(
        first_token_s=np.array([min(times, default=math.nan) for times in firsts]),
        end_s=np.array([max(sample.end_s for sample in group) for group in samples]),
        num_preemptions=np.array([sum(sample.num_preemptions for sample in group) for group in samples]),
        is_aborted=np.array([any(sample.reason not in OWN_ENDS for sample in group) for group in samples]),
        max_new_tokens=np.array([row.max_new_tokens for row in rows]),
        priority=np.array([row.priority for row in rows]),
        reads_cache=np.array([row.reads_cache for row in rows]),
        num_samples=np.array([len(group) for group in samples]),
        sample_tokens=np.array([sample.num_output_tokens for group in samples for sample in group]),
        has_stopped=np.array([_has_stopped(sample, row) for row in rows for sample in row.samples]),
    )


def _has_stopped(sample: _Sample, row: _Request) -> bool:
    return sample.reason != FinishReason.LENGTH or sample.num_output_tokens < row.max_new_tokens


def _check(source: TraceSource, line: int, row: _Request) -> None:
    """Raise TraceError for fields that contradict each other."""
    if not 1 <= len(row.samples) <= MAX_SAMPLES:
        raise source.error(line, f"1 to {MAX_SAMPLES} samples", str(len(row.samples)))
    if not math.isfinite(row.priority):
        raise source.error(line, "a finite priority", str(row.priority))
    for sample in row.samples:
        first_s = sample.first_token_s
        if not 0 <= sample.num_output_tokens <= MAX_TOKENS or not 0 <= sample.num_preemptions <= MAX_TOKENS:
            found = f"{sample.num_output_tokens} and {sample.num_preemptions}"
            raise source.error(line, f"tokens and preemptions of 0 to {MAX_TOKENS}", found)
        if (first_s is None) != (sample.num_output_tokens == 0):
            raise source.error(line, "first_token_s exactly where tokens came", f"{first_s}")
        if not row.arrival_s <= (sample.end_s if first_s is None else first_s) <= sample.end_s < math.inf:
            found = f"{row.arrival_s}, {first_s}, {sample.end_s}"
            raise source.error(line, "arrival, first token and end in order", found)
    if not 0 <= row.max_new_tokens <= MAX_TOKENS:
        raise source.error(line, f"max_new_tokens of 0 to {MAX_TOKENS}", str(row.max_new_tokens))
    longest = max(sample.num_output_tokens for sample in row.samples)
    if longest > row.max_new_tokens:
        raise source.error(line, f"at most max_new_tokens {row.max_new_tokens} tokens", str(longest))
    if row.output_tokens != longest:
        raise source.error(line, f"output_tokens {longest} of the longest sample", str(row.output_tokens))


def _source(path: Path, header: RunHeader) -> TraceSource:
    return TraceSource(path) if header.is_complete else _CutSource(path)
