"""Figures of a run, from timestamps only. docs/metrics.md gives each as a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.run import Run

__all__ = ["latencies", "summarize", "weighted_quantiles", "weighted_statistics"]

PERCENTILES = (50, 90, 99)


def latencies(run: Run) -> dict[str, NDArray[np.float64]]:
    """Per request, (n,) seconds: `queue_s`, `ttft_s`, `tpot_s`, `e2e_s`; NaN where undefined."""
    log, arrival = run.requests, run.trace.arrival_s
    num_gaps = np.maximum(log.num_output - 1, 1)
    tpot = np.where(log.num_output >= 2, (log.finished_s - log.first_token_s) / num_gaps, np.nan)
    return {
        "queue_s": log.admitted_s - arrival,
        "ttft_s": np.where(log.num_output >= 1, log.first_token_s - arrival, np.nan),
        "tpot_s": tpot,
        "e2e_s": log.finished_s - arrival,
    }


def weighted_quantiles(
    values: NDArray[np.float64], counts: NDArray[np.int64], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Quantiles, at levels from 0 to 1, of `values`, ascending, each occurring `counts` times; at least one occurs.

    Linear interpolation between the two nearest, as numpy's default; O(values + levels log values).

    >>> weighted_quantiles(np.array([1.0, 5.0]), np.array([3, 1]), np.array([0.5, 0.75, 1.0])).tolist()
    [1.0, 2.0, 5.0]
    """
    ends = np.cumsum(counts)
    last = int(ends[-1]) - 1
    positions = last * levels
    below = np.floor(positions).astype(np.int64)
    low = values[ends.searchsorted(below, side="right")]
    high = values[ends.searchsorted(np.minimum(below + 1, last), side="right")]
    quantiles: NDArray[np.float64] = low + (high - low) * (positions - below)
    return quantiles


def weighted_statistics(values: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean, percentiles and maximum of `values`, ascending, each occurring `counts` times; None if there are none."""
    total = int(counts.sum())
    names = [f"p{percentile}" for percentile in PERCENTILES]
    if total == 0:
        return dict.fromkeys(("mean", *names, "max"))
    quantiles = weighted_quantiles(values, counts, np.array(PERCENTILES) / 100)
    return {
        "mean": float((values * counts).sum() / total),
        **dict(zip(names, quantiles.tolist(), strict=True)),
        "max": float(values[-1]),
    }


def _statistics(values: NDArray[np.float64]) -> dict[str, float | None]:
    finite = np.sort(values[~np.isnan(values)])
    return weighted_statistics(finite, np.ones(len(finite), np.int64))


def summarize(run: Run) -> dict[str, Any]:
    """The stable keys of `summary.json`: counts, throughputs, prefix hits, utilisation, and five latency distributions."""
    log, steps = run.requests, run.steps
    is_finished = ~np.isnan(log.finished_s)
    num_finished = int(np.count_nonzero(is_finished))
    ends = steps.column("start_s") + steps.column("duration_s")
    makespan = float(ends[-1] - run.trace.arrival_s[0]) if len(steps) else 0.0
    durations, used = steps.column("duration_s"), steps.column("num_used_blocks")
    prompt_tokens = int(run.trace.prompt_tokens[is_finished].sum())
    output_tokens = int(log.num_output[is_finished].sum())
    hit_tokens = int(log.num_hit[is_finished].sum())
    # The sum of all durations may round to a hair more than the makespan, which is one difference.
    mean_used = min(float((used * durations).sum() / makespan / run.num_blocks), 1.0) if makespan else 0.0
    by_request = latencies(run)
    return {
        "num_requests": len(run.trace),
        "num_finished": num_finished,
        "num_rejected": int(log.is_rejected.sum()),
        "num_preemptions": len(run.preemptions),
        "num_swaps": sum(event.mode == "swap" for event in run.preemptions),
        "makespan_s": makespan,
        "request_throughput": num_finished / makespan if makespan else None,
        "output_token_throughput": output_tokens / makespan if makespan else None,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefix_hit_tokens": hit_tokens,
        "prefix_hit_ratio": hit_tokens / prompt_tokens if prompt_tokens else None,
        "kv_utilization_mean": mean_used,
        "kv_utilization_max": float(used.max() / run.num_blocks) if len(steps) else 0.0,
        "num_steps": len(steps),
        "wall_s": run.wall_s,
        "requests_per_wall_s": num_finished / run.wall_s if run.wall_s else None,
        "ttft_s": _statistics(by_request["ttft_s"]),
        "tpot_s": _statistics(by_request["tpot_s"]),
        "itl_s": weighted_statistics(*run.gaps.values()),
        "e2e_s": _statistics(by_request["e2e_s"]),
        "queue_s": _statistics(by_request["queue_s"]),
    }
