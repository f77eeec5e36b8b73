"""`pagedkv fit`: learn the step times of a real engine from a recorded run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pagedkv.simulations.cost_models.fitted import save_cost_model
from pagedkv.simulations.cost_models.fitting import CONSTANTS, StepFit, fit_steps
from pagedkv.simulations.reports.quantities import to_count, to_duration, to_share
from pagedkv.simulations.run_records import RunHeader, read_header, read_steps

__all__ = ["fit"]

_UNITS = {
    "base_s": "step",
    "per_token_s": "token computed",
    "per_context_token_s": "context token read",
    "per_row_s": "row",
    "per_attention_pair_s": "query-key pair",
    "per_swapped_block_s": "block swapped",
    "per_copied_block_s": "block copied",
}


def fit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a recorded run.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. Default: cost_model.json in the folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Fit the linear cost model to the steps of a recorded run, for `pagedkv replay --cost-model`.

    Least squares of the relative error, no constant below 0, outliers bounded. Prints how well the model describes the
    steps, and which constants they cannot determine.
    """
    header = read_header(run)
    steps = read_steps(run, header)
    fitted = fit_steps(steps.load, steps.end_s - steps.start_s)
    target = run / "cost_model.json" if out is None else out
    save_cost_model(fitted, target, {"folder": run.name, "block_size": header.cache.block_size, "model": header.model})
    if as_json:
        constants = dataclasses.asdict(fitted.model)
        typer.echo(json.dumps({"constants": constants, **fitted.describe(), "file": str(target)}))
    else:
        _print(run, header, fitted, target)


def _print(run: Path, header: RunHeader, fitted: StepFit, target: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    facts = ", ".join(f"{name} {value}" for name, value in header.model.items())
    cut = "" if header.is_complete else "  (cut off: read up to the last complete line)"
    title = Text.assemble((run.name, "bold"), f"  {to_count(fitted.num_steps)} steps, measured{cut}  {facts}")
    console.print(title, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("constant", no_wrap=True)
    table.add_column("fitted", justify="right", no_wrap=True)
    table.add_column("± standard error", justify="right", no_wrap=True)
    table.add_column("per", no_wrap=True)
    for name in CONSTANTS:
        if name not in fitted.unidentified:
            table.add_row(name, *_cells(getattr(fitted.model, name), fitted.standard_errors[name]), _UNITS[name])
    console.print(table)
    r_squared = "undefined" if fitted.r_squared is None else f"{fitted.r_squared:.4f}"
    median, p90 = to_share(fitted.median_error), to_share(fitted.p90_error)
    measured, modelled = to_duration(fitted.total_measured_s), to_duration(fitted.total_model_s)
    excess = 100 * (fitted.total_model_s / fitted.total_measured_s - 1)
    lines = [
        *(f"{name}: {reason}" for name, reason in fitted.unidentified.items()),
        f"error of a step's time: median {median}, 90th percentile {p90}, R² {r_squared}",
        f"all steps together: measured {measured}, model {modelled} ({excess:+.1f} %)",
        f"steps off by more than a factor of 2: {to_count(fitted.num_outliers)}",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"wrote {target}", style="dim"), soft_wrap=True)


def _cells(value: float, error: float | None) -> tuple[str, str]:
    return _fine(value), "at the bound of 0" if error is None else _fine(error)


def _fine(seconds: float) -> str:
    """As `to_duration`, down to nanoseconds and below: a context token may cost less than that."""
    return f"{seconds * 1e9:.3g} ns" if 0 < seconds < 1e-6 else to_duration(seconds)
