"""`summary.json`: the figures of a run, what was replayed, and on what."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedkv.simulations.run import Run

__all__ = ["summary_text", "write_summary"]


def write_summary(run: Run, summary: Mapping[str, Any], path: Path) -> Path:
    """Write `summary_text(run, summary)`; return `path`."""
    path.write_text(summary_text(run, summary, indent=2) + "\n", encoding="ascii", newline="\n")
    return path


def summary_text(run: Run, summary: Mapping[str, Any], indent: int | None = None) -> str:
    """`summary`, as `summarize(run)` gives it, with the trace's identity and the configuration, as JSON.

    Floats round-trip; what is undefined, infinite or NaN is null. Only `wall_s` and `requests_per_wall_s` differ
    between two runs of the same thing. docs/metrics.md lists the keys.
    """
    trace = run.trace
    document = {
        "trace": {"name": trace.name, "format": trace.format, "digest": trace.digest},
        **summary,
        "configuration": run.configuration,
    }
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return `value` with None for every float that JSON cannot say, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
