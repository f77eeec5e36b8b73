"""BurstGPT: `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`; version 2 adds two columns.

Source: HPMLL/BurstGPT. Timestamps are seconds, taken as given. 0 response tokens mean that the request failed; it is
kept, as a prefill-only request, and `describe` counts it.
"""

from __future__ import annotations

from pagedkv.simulations.traces.columns import ColumnBuilder
from pagedkv.simulations.traces.csv_blocks import read_csv
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["read_trace"]


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read a BurstGPT trace; model, log type and session are ignored."""
    builder = ColumnBuilder(source)
    for block in read_csv(source, ("Timestamp", "Request tokens", "Response tokens")):
        builder.add(
            block.first_line,
            block.numbers("Timestamp"),
            block.integers("Request tokens"),
            block.integers("Response tokens"),
        )
    return builder.build("burstgpt", line_of=lambda request: request + 2)
