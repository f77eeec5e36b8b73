"""A figure of `report.html`: plotly's own data and layout, written without importing plotly, and the words around it.

Colours are written `@name` and resolved by the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.reports.quantities import to_duration

__all__ = ["Figure", "legend_above", "seconds_axis", "to_json"]


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One figure.

    key:           names it within the page
    data, layout:  plotly's; arrays are numpy's
    has_time_axis: whether its x axis is the trace's time, which all such figures share when zoomed
    is_wide:       whether it takes the full width of the page
    num_rows:      plots one above the other
    """

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    has_time_axis: bool = True
    is_wide: bool = True
    num_rows: int = 1


def legend_above() -> dict[str, Any]:
    """A legend in one line above the plot."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}


def seconds_axis(title: str, *values: NDArray[Any]) -> dict[str, Any]:
    """A logarithmic axis in seconds for values of which at least one is above 0, marked in the units that people say.

    >>> seconds_axis("time", np.array([0.0, 0.03, 0.2]))["ticktext"]
    ['20 ms', '50 ms', '100 ms', '200 ms']
    """
    drawn = np.concatenate([column[column > 0] for column in values])
    low, high = float(drawn.min()), float(drawn.max())
    is_short = high / low <= 300
    steps = (1, 2, 5) if is_short else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    if is_short:
        ticks = [tick for tick in ticks if low / 2 <= tick <= 2 * high]
    elif high / low > 1e5:
        ticks = [tick for tick in ticks if round(math.log10(tick)) % 2 == 0]
    return {
        "type": "log",
        "title": {"text": title},
        "tickangle": 0,
        "tickvals": ticks,
        "ticktext": [to_duration(tick).replace(".00", "").replace(".0 ", " ") for tick in ticks],
        "minor": {"ticks": "inside", "ticklen": 3, "dtick": "D1"},
    }


def to_json(value: Any) -> str:
    r"""JSON that may stand within a `<script>` element. Arrays are in plotly's typed form: exact, small and fast.

    >>> to_json({"a<b": np.array([1.5])})
    '{"a\\u003cb":{"dtype":"f8","bdata":"AAAAAAAA+D8="}}'
    """
    text = json.dumps(value, separators=(",", ":"), default=_to_typed, allow_nan=False)
    return text.replace("<", "\\u003c")


def _to_typed(array: NDArray[Any]) -> dict[str, str]:
    kind = "i4" if array.dtype.kind in "iu" else "f4" if array.dtype == np.float32 else "f8"
    return {"dtype": kind, "bdata": base64.b64encode(array.astype(f"<{kind}").tobytes()).decode("ascii")}
