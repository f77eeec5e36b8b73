"""Figures of a run, from timestamps only. docs/metrics.md gives each as a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.run import Run

__all__ = ["latencies", "summarize", "weighted_statistics"]

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


def weighted_statistics(values: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean, percentiles (linear interpolation) and maximum of `values`, ascending, each occurring `counts` times."""
    total = int(counts.sum())
    if total == 0:
        return {"mean": None, **{f"p{percentile}": None for percentile in PERCENTILES}, "max": None}
    ends = np.cumsum(counts)
    figures: dict[str, float | None] = {"mean": float((values * counts).sum() / total)}
    for percentile in PERCENTILES:
        position = (total - 1) * percentile / 100
        below = int(position)
        low = values[np.searchsorted(ends, below, side="right")]
        high = values[np.searchsorted(ends, min(below + 1, total - 1), side="right")]
        figures[f"p{percentile}"] = float(low + (high - low) * (position - below))
    figures["max"] = float(values[-1])
    return figures


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
    output_tokens = int(log.num_output.sum())
    hit_tokens = int(log.num_hit.sum())
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
        "kv_utilization_mean": float((used * durations).sum() / makespan / run.num_blocks) if makespan else 0.0,
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
