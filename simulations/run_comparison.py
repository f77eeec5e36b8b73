"""A recorded run beside its replay: what was measured, what was simulated, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.metrics import weighted_statistics
from pagedkv.simulations.reports.quantities import UNDEFINED, to_count, to_duration
from pagedkv.simulations.run import Run
from pagedkv.simulations.run_records import RunRecord

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare_run", "print_comparison"]

Floats = NDArray[np.float64]
Figures = dict[str, Any]

_STATISTICS = ("mean", "p50", "p90", "p99")
_LATENCIES = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E"))
_TOTALS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("makespan_s", "makespan", to_duration),
    ("between_steps_s", "between steps", to_duration),
    ("num_steps", "steps", to_count),
    ("computed_tokens", "tokens computed", to_count),
    ("num_preemptions", "preemptions", to_count),
)


def compare_run(record: RunRecord, run: Run) -> Figures:
    """Figures of a recorded run and of its replay: `{figure: {recorded, simulated, relative_error}}`.

    `makespan_s`, `between_steps_s` (time in which requests were there and no step ran), `num_steps`, `computed_tokens` (of
    prompts and outputs, those that were computed again included), `num_preemptions`; `ttft_s`, `tpot_s`, `e2e_s` hold
    `mean`, `p50`, `p90`, `p99`. Latencies, of both, are over the `num_compared` requests that ended by themselves in both,
    measured to the last token of the longest or last sample; `num_aborted` of the others did not in the engine, and
    `num_rejected` more were refused in the simulation. `relative_error` is simulated / recorded - 1, or None where that is
    undefined.
    """
    requests, steps, log = record.requests, record.steps, run.requests
    is_taken = ~log.is_rejected
    counts = is_taken & ~requests.is_aborted
    arrivals = run.trace.arrival_s
    measured = _latencies(
        record.trace.arrival_s, requests.first_token_s, requests.end_s, record.trace.output_tokens, counts
    )
    simulated = _latencies(arrivals, log.first_token_s, log.finished_s, log.num_output, counts)
    starts = run.steps.column("start_s")
    ends = starts + run.steps.column("duration_s")
    totals = {
        "makespan_s": (
            float(steps.end_s.max() - record.trace.arrival_s[0]),
            float(ends.max() - arrivals[0]) if len(ends) else 0.0,
        ),
        "between_steps_s": (
            _time_between(record.trace.arrival_s, requests.end_s, steps.start_s, steps.end_s),
            _time_between(arrivals[is_taken], log.finished_s, starts, ends),
        ),
        "num_steps": (len(steps), len(run.steps)),
        "computed_tokens": (int(np.sum(steps.load.num_tokens)), int(run.steps.column("num_tokens").sum())),
        "num_preemptions": (int(requests.num_preemptions.sum()), len(run.preemptions)),
    }
    figures: Figures = {
        "num_compared": int(np.count_nonzero(counts)),
        "num_aborted": int(np.count_nonzero(requests.is_aborted)),
        "num_rejected": int(np.count_nonzero(log.is_rejected & ~requests.is_aborted)),
    }
    figures |= {name: _pair(*pair) for name, pair in totals.items()}
    for name in measured:
        figures[name] = {key: _pair(measured[name][key], simulated[name][key]) for key in _STATISTICS}
    return figures


def _latencies(
    arrival_s: Floats, first_token_s: Floats, end_s: Floats, num_output: NDArray[np.int64], counts: NDArray[np.bool_]
) -> dict[str, dict[str, float | None]]:
    """As docs/metrics.md defines them, over the requests that count."""
    gaps = np.where(num_output >= 2, (end_s - first_token_s) / np.maximum(num_output - 1, 1), np.nan)
    ttft = np.where(num_output >= 1, first_token_s - arrival_s, np.nan)
    columns = {"ttft_s": ttft, "tpot_s": gaps, "e2e_s": end_s - arrival_s}
    return {name: _statistics(values[counts]) for name, values in columns.items()}


def _statistics(values: Floats) -> dict[str, float | None]:
    defined = np.sort(values[~np.isnan(values)])
    return weighted_statistics(defined, np.ones(len(defined), np.int64))


def _time_between(arrival_s: Floats, ended_s: Floats, start_s: Floats, end_s: Floats) -> float:
    """Seconds from the end of a step to the start of the next while a request that had arrived had not ended."""
    ended = np.sort(ended_s[~np.isnan(ended_s)])
    num_live = arrival_s.searchsorted(end_s[:-1], side="right") - ended.searchsorted(end_s[:-1], side="right")
    gaps = np.maximum(start_s[1:] - end_s[:-1], 0.0)
    return float(gaps[num_live > 0].sum())


def _pair(recorded: float | None, simulated: float | None) -> Figures:
    error = simulated / recorded - 1 if recorded and simulated is not None else None
    return {"recorded": recorded, "simulated": simulated, "relative_error": error}


def print_comparison(figures: Mapping[str, Any], options: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the figures as a table; `options` are those in which the replay differs from the recorded engine."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recorded run and replay", no_wrap=True)
    for heading in ("recorded (measured)", "simulated", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, name, show in _TOTALS:
        table.add_row(name, *_cells(figures[key], show))
    for key, name in _LATENCIES:
        for statistic in _STATISTICS:
            table.add_row(f"{name} {statistic}", *_cells(figures[key][statistic], to_duration))
    console = Console(highlight=False) if console is None else console
    console.print(table)
    console.print(Text(_coverage(figures)), soft_wrap=True)
    if options:
        changed = ", ".join(f"{name} {value}" for name, value in options.items())
        console.print(Text(f"simulated with other options than recorded: {changed}"), soft_wrap=True)


def _coverage(figures: Mapping[str, Any]) -> str:
    """Over which requests the latencies are."""
    text = f"latencies over the {to_count(figures['num_compared'])} requests that finished in both"
    reasons = (("num_aborted", "aborted in the engine"), ("num_rejected", "rejected in the simulation"))
    left_out = [f"{to_count(figures[key])} {reason}" for key, reason in reasons if figures[key]]
    return f"{text}; left out: {', '.join(left_out)}" if left_out else text


def _cells(pair: Mapping[str, Any], show: Callable[[float | None], str]) -> tuple[str, str, str]:
    error = pair["relative_error"]
    return show(pair["recorded"]), show(pair["simulated"]), UNDEFINED if error is None else f"{100 * error:+.1f} %"
