"""How far is a simulated timeline from the real one that it simulates?

The engine serves Poisson arrivals with the lengths of the Azure conversation trace, divided by 8, on a clock that runs with
the CPU time of the serving thread, and records the run. A cost model is fitted to one run; this run and another one, of
other requests, are then replayed by the simulator with it. `python benchmarks/bench_recorded_run.py`
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from engine_peers import small_llama
from engine_stream import azure_workload, serve_engine
from public_traces import AZURE_CONVERSATION, missing

from pagedkv.simulations.cost_models import fit_steps
from pagedkv.simulations.recorded_replay import replay_run
from pagedkv.simulations.run_comparison import compare_run
from pagedkv.simulations.run_records import RunRecord, read_run

RATE = 20.0
FIGURES = (
    ("makespan_s", None),
    ("ttft_s", "mean"),
    ("ttft_s", "p90"),
    ("tpot_s", "mean"),
    ("tpot_s", "p90"),
    ("e2e_s", "mean"),
)


def record(model: Any, folder: Path, first: int) -> RunRecord:
    """Serve 256 requests of the trace from the `first`-th on, after a run that warms everything up."""
    work = azure_workload(seed=first, first=first)
    serve_engine(model, work, RATE)
    serve_engine(model, work, RATE, record=folder)
    return read_run(folder)


def main() -> None:
    if missing(AZURE_CONVERSATION):
        return
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report = harness.Report(__doc__ or "")
    report.machine |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": "1"}
    model = small_llama()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: record(model, Path(folder) / name, first) for name, first in (("fitted", 0), ("other", 1000))}
        steps = runs["fitted"].steps
        fit = fit_steps(steps.load, steps.end_s - steps.start_s)
        error = {"median": fit.median_error, "min": fit.median_error, "max": fit.p90_error}
        report.add("step time, median and (max) p90 of the relative error", error, "", steps=fit.num_steps)
        for name, run in runs.items():
            compared = compare_run(run, replay_run(run, fit.model))
            for figure, statistic in FIGURES:
                pair = compared[figure] if statistic is None else compared[figure][statistic]
                measured = dict.fromkeys(("median", "min", "max"), pair["recorded"] * 1e3)
                report.add(
                    f"{name} run, {figure.removesuffix('_s')} {statistic or ''}".rstrip() + ", measured",
                    measured,
                    "ms",
                    simulated_ms=round(pair["simulated"] * 1e3, 2),
                    error=f"{100 * pair['relative_error']:+.1f} %",
                )
    report.write()


if __name__ == "__main__":
    main()
