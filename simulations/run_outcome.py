"""How a run under faults ends on the command line: figures or JSON, or what failed and exit code 1."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import typer

from pagedkv.simulations.progress import progress_bar
from pagedkv.testing.liveness.run import LivenessReport
from pagedkv.testing.soak.run import SoakReport
from pagedkv.testing.soak.run_failed import RunFailedError

__all__ = ["run_and_tell"]

R = TypeVar("R", SoakReport, LivenessReport)
Progress = Callable[[float], None] | None


def run_and_tell(
    run: Callable[[Progress], R], total: float, figures: Callable[[R, float], dict[str, Any]], *, as_json: bool
) -> None:
    """Carry out `run`, which reports its progress up to `total`, and print the `figures` of its report and wall time."""
    start = time.perf_counter()
    try:
        with progress_bar("serving", total) as progress:
            report = run(progress)
    except RunFailedError as failure:
        if as_json:
            outcome = {"passed": False, "invariant": failure.invariant, "message": str(failure)}
            typer.echo(json.dumps({**outcome, "command": failure.command}))
        else:
            typer.echo(f"failed: {failure}", err=True)
        raise typer.Exit(1) from None
    wall_s = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps({"passed": True, "wall_s": wall_s, **asdict(report)}))
        return
    for name, value in figures(report, wall_s).items():
        typer.echo(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value}")
