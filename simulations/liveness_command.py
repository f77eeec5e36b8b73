"""`pagedkv liveness`: overload after overload under faults; once they stop, everybody must get through in time."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from pagedkv.errors import ConfigError
from pagedkv.simulations.progress import progress_bar
from pagedkv.testing.liveness.run import LivenessFailedError, LivenessReport, run_liveness

__all__ = ["liveness"]


def liveness(
    traces: Annotated[
        int, typer.Option(help="Overloads to serve, one for each seed; a hundred take about a second.")
    ] = 1000,
    first_seed: Annotated[int, typer.Option(help="Seed of the first one; split long runs by it.")] = 0,
    only_requests: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Leave out all other requests: 0,3 or none.")
    ] = None,
    only_faults: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Leave out all other faults: 0,3 or none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Serve small overloads while memory runs out, steps fail, clients leave and clocks jump; then nothing fails any more.

    From then on every request that fits must be served within the steps that the scheduler states.

    Exit code 1, and the command that does it again, shrunk, if one is not.
    """
    requests, faults = _numbers("only-requests", only_requests), _numbers("only-faults", only_faults)
    start = time.perf_counter()
    try:
        with progress_bar("serving", traces) as progress:
            report = run_liveness(
                traces, first_seed=first_seed, only_requests=requests, only_faults=faults, progress=progress
            )
    except LivenessFailedError as failure:
        if as_json:
            outcome = {"passed": False, "invariant": failure.invariant, "message": str(failure)}
            typer.echo(json.dumps({**outcome, "command": failure.command}))
        else:
            typer.echo(f"failed: {failure}", err=True)
        raise typer.Exit(1) from None
    wall_s = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps({"passed": True, "wall_s": wall_s, **asdict(report)}))
    else:
        _print(report, wall_s)


def _numbers(option: str, text: str | None) -> list[int] | None:
    """A list such as 0,3; None if the option was not given. Raises ConfigError."""
    if text is None:
        return None
    try:
        return [] if text == "none" else [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be numbers such as 0,3, or none, found {text!r}") from None


def _print(report: LivenessReport, wall_s: float) -> None:
    last_seed = report.first_seed + report.num_traces - 1
    figures = {
        "overloads": f"{report.num_traces:,}, seeds {report.first_seed} to {last_seed}, in {wall_s:.1f} s",
        "requests": f"{report.num_requests:,}, of which {report.num_served:,} were served and the others aborted",
        "steps": f"{report.num_steps:,}, of which {report.num_failed_steps:,} failed",
        "preemptions": f"{report.num_preemptions:,}, at most {report.max_preemptions} each",
        "faults": f"{sum(report.faults.values()):,} of {len(report.faults)} kinds",
        "time to get through": f"at most {report.max_share:.0%} of the steps that were stated",
    }
    for name, value in figures.items():
        typer.echo(f"{name:20} {value}")
