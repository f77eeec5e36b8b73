"""Distributions of the latencies: percentiles over a logarithmic axis."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.metrics import latencies, weighted_quantiles
from pagedkv.simulations.reports.figure import Figure, legend_above, seconds_axis
from pagedkv.simulations.reports.quantities import to_share
from pagedkv.simulations.run import Run

__all__ = ["draw_distributions"]

# Probability paper: percentiles are placed as those of a normal distribution, which gives the tails as much room as the
# middle. A plain axis shows p99 and p99.9 as one line at the top, and those are what service levels are about.
_HEIGHT = 3.1  # standard deviations, p0.1 to p99.9
_NORMAL = NormalDist()
_MARKS = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)

Counted = tuple[NDArray[np.float64], NDArray[np.int64]]


def draw_distributions(run: Run) -> list[Figure]:
    """One figure of what a request waits for, and one of the times per token; none where nothing has that latency."""
    by_request = latencies(run)
    queue, ttft, e2e, tpot = (_counted(by_request[name]) for name in ("queue_s", "ttft_s", "e2e_s", "tpot_s"))
    how_to_read = (
        "Read across from p99 to find the time that 99 % stay within. The scale is stretched towards both ends, so that "
        "tails can be seen; it ends at p99.9, and the maximum is in the table above."
    )
    drawn = [
        _figure(
            "latencies",
            "Latency of a request",
            f"{how_to_read} A line that bends to the right at the top has a heavy tail. Where the queue's line comes close "
            f"to that of TTFT, requests wait for a seat rather than for their prompt.{_about_zeros(*queue)}",
            [("queue", queue, "@grey"), ("TTFT", ttft, "@blue"), ("E2E", e2e, "@orange")],
        ),
        _figure(
            "token-times",
            "Time per output token",
            "TPOT is a request's mean time per token after the first, and each request counts once; ITL is the time "
            "between two tokens, and each token counts once. ITL far to the right of TPOT at the top: single slow steps, "
            "such as other requests' prefills, or preemptions.",
            [("TPOT", tpot, "@blue"), ("ITL", run.gaps.values(), "@orange")],
        ),
    ]
    return [figure for figure in drawn if figure is not None]


def _counted(values: NDArray[np.float64]) -> Counted:
    finite = np.sort(values[~np.isnan(values)])
    return finite, np.ones(len(finite), np.int64)


def _figure(key: str, title: str, caption: str, curves: list[tuple[str, Counted, str]]) -> Figure | None:
    """A figure of the curves that have anything above zero; None without any."""
    data = [_curve(name, *counted, color=color) for name, counted, color in curves if (counted[0] > 0).any()]
    if not data:
        return None
    layout = {
        "xaxis": seconds_axis("time (log scale)", *(curve["x"] for curve in data)),
        "yaxis": {
            "title": {"text": "percentile"},
            "range": [-_HEIGHT, _HEIGHT],
            "tickvals": [_NORMAL.inv_cdf(mark) for mark in _MARKS],
            "ticktext": [f"p{100 * mark:g}" for mark in _MARKS],
            "zeroline": False,
        },
        "legend": legend_above(),
        "hovermode": "closest",
    }
    return Figure(key, title, caption, data, layout, has_time_axis=False, is_wide=False)


def _curve(name: str, values: NDArray[np.float64], counts: NDArray[np.int64], *, color: str) -> dict[str, Any]:
    """The percentiles of one quantity, from p0.1 to p99.9; those that are zero cannot be drawn."""
    heights = np.linspace(_NORMAL.inv_cdf(_MARKS[0]), _NORMAL.inv_cdf(_MARKS[-1]), 401)
    levels = np.array([_NORMAL.cdf(height) for height in heights.tolist()])
    quantiles = weighted_quantiles(values, counts, levels)
    is_drawn = quantiles > 0
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": quantiles[is_drawn].astype(np.float32),
        "y": heights[is_drawn].astype(np.float32),
        "customdata": (100 * levels[is_drawn]).astype(np.float32),
        "line": {"width": 2, "color": color},
        "hovertemplate": f"p%{{customdata:.4~g}}: %{{x:.3s}}s<extra>{name}</extra>",
    }


def _about_zeros(values: NDArray[np.float64], counts: NDArray[np.int64]) -> str:
    num_zeros = int(counts[values <= 0].sum())
    if not num_zeros:
        return ""
    return (
        f" {to_share(num_zeros / int(counts.sum()))} of the requests did not queue at all, which this axis cannot show."
    )
