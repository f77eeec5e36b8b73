"""`pagedkv liveness`: overload after overload under faults; once they stop, everybody must get through in time."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagedkv.errors import ConfigError
from pagedkv.simulations.run_outcome import run_and_tell
from pagedkv.testing.liveness.run import LivenessReport, run_liveness

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
    run_and_tell(
        lambda progress: run_liveness(
            traces, first_seed=first_seed, only_requests=requests, only_faults=faults, progress=progress
        ),
        traces,
        _figures,
        as_json=as_json,
    )


def _numbers(option: str, text: str | None) -> list[int] | None:
    """A list such as 0,3; None if the option was not given. Raises ConfigError."""
    if text is None:
        return None
    try:
        return [] if text == "none" else [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be numbers such as 0,3, or none, found {text!r}") from None


def _figures(report: LivenessReport, wall_s: float) -> dict[str, Any]:
    last_seed = report.first_seed + report.num_traces - 1
    return {
        "overloads": f"{report.num_traces:,}, seeds {report.first_seed} to {last_seed}, in {wall_s:.1f} s",
        "requests": f"{report.num_requests:,}, of which {report.num_served:,} were served and the others aborted",
        "steps": f"{report.num_steps:,}, of which {report.num_failed_steps:,} failed",
        "preemptions": f"{report.num_preemptions:,}, at most {report.max_preemptions} each",
        "faults": f"{sum(report.faults.values()):,} of {len(report.faults)} kinds",
        "time to get through": f"at most {report.max_share:.0%} of the steps that were stated",
    }
