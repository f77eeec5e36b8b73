"""Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, timestamps of wall-clock time.

Source: Azure/AzurePublicDataset. 2023: `2023-11-16 18:15:46.6805900`; 2024: `2024-05-10 00:00:00.009930+00:00`.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.columns import ColumnBuilder
from pagedkv.simulations.traces.csv_blocks import CsvBlock, read_csv
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["read_trace"]

_COLUMN: Final = "TIMESTAMP"
_TIMESTAMP: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:\+00:00)?"
)


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read an Azure trace; arrivals count from the first row, exact to the nanosecond."""
    builder = ColumnBuilder(source)
    origin: tuple[np.int64, np.int64] | None = None
    for block in read_csv(source, (_COLUMN, "ContextTokens", "GeneratedTokens")):
        seconds, nanoseconds = _parse_timestamps(block)
        origin = (seconds[0], nanoseconds[0]) if origin is None else origin
        arrival_s = _seconds_since(origin, seconds, nanoseconds)
        is_outside = ~((arrival_s >= 0) & (arrival_s <= limits.MAX_ARRIVAL_S))
        if is_outside.any():
            row = int(is_outside.argmax())
            expected = f"a timestamp at most {limits.MAX_ARRIVAL_S:g} s after the first, and not before it"
            raise block.error(row, expected, block.cells[_COLUMN][row])
        builder.add(block.first_line, arrival_s, block.integers("ContextTokens"), block.integers("GeneratedTokens"))
    return builder.build("azure", line_of=lambda request: request + 2)


def _parse_timestamps(block: CsvBlock) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return whole seconds since 1970 and the nanoseconds beyond, each (n,) int64."""
    seconds, nanoseconds = [], []
    for row, cell in enumerate(block.cells[_COLUMN]):
        match = _TIMESTAMP.fullmatch(cell)
        if match is None:
            raise block.error(row, "a timestamp 'YYYY-MM-DD HH:MM:SS.fffffff'", cell)
        second, fraction = match.groups()
        seconds.append(second)
        nanoseconds.append(int(fraction.ljust(9, "0")) if fraction else 0)
    try:
        parsed = np.array(seconds, dtype="datetime64[s]")
    except ValueError:
        row = next(row for row, second in enumerate(seconds) if not _is_date(second))
        raise block.error(row, "a date and time that exist", block.cells[_COLUMN][row]) from None
    return parsed.astype(np.int64), np.array(nanoseconds, dtype=np.int64)


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text, "s")
    except ValueError:
        return False
    return True


def _seconds_since(
    origin: tuple[np.int64, np.int64], seconds: npt.NDArray[np.int64], nanoseconds: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    # In whole nanoseconds, so that a trace has the same arrivals whatever its date; beyond the bound they would overflow.
    too_far = 2 * int(limits.MAX_ARRIVAL_S)
    elapsed_s = np.clip(seconds - origin[0], -too_far, too_far)
    elapsed_ns: npt.NDArray[np.int64] = elapsed_s * 10**9 + (nanoseconds - origin[1])
    return elapsed_ns.astype(np.float64) / 1e9
