"""`pagedkv soak`: a service for simulated hours, under faults, in minutes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagedkv.simulations.run_outcome import run_and_tell
from pagedkv.testing.soak.run import SoakReport, run_soak
from pagedkv.testing.soak.settings import SERVICE_HOURS, SoakConfig

__all__ = ["soak"]


def soak(
    hours: Annotated[float, typer.Option(help="Simulated hours; one takes a few seconds.")] = 24.0,
    seed: Annotated[int, typer.Option(help="Everything is drawn from it: services, requests, faults.")] = 0,
    service_hours: Annotated[
        float, typer.Option(help="Simulated hours after which the service is set up anew, with another configuration.")
    ] = SERVICE_HOURS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Serve requests for simulated hours while memory runs out, copies fail, clients leave and clocks jump.

    What must hold is checked all the time; every ten simulated minutes the faults stop, and everybody must get through, with
    nothing left behind.

    Exit code 1, and the command that does it again, if something does not hold.
    """
    config = SoakConfig(hours, seed, service_hours)
    run_and_tell(lambda progress: run_soak(config, progress=progress), hours, _figures, as_json=as_json)


def _figures(report: SoakReport, wall_s: float) -> dict[str, Any]:
    config = report.config
    growth = report.rss_growth_bytes
    return {
        "simulated hours": f"{config.hours:g}, seed {config.seed}",
        "wall time": f"{wall_s:.1f} s, {config.hours * 3600 / wall_s:,.0f} times as fast",
        "services": report.num_services,
        "steps": report.num_steps,
        "requests": f"{report.num_requests:,} added, {report.num_refused:,} refused, {report.num_aborted:,} aborted",
        "answers": f"{report.num_finished_samples:,} with {report.num_tokens:,} tokens, all as without a cache",
        "preemptions": f"{report.num_preemptions:,}, {report.num_swaps:,} of them swaps, at most {report.max_preemptions} each",
        "failed steps": report.num_failed_steps,
        "longest drain": f"{report.max_drain_steps:,} steps",
        "faults": f"{sum(report.faults.values()):,}",
        "failed allocations": ", ".join(f"{count} {point}" for point, count in report.failed_allocations.items()),
        "resident memory": "not known" if growth is None else f"{growth / 1e6:+.1f} MB since the first hour",
        "digest of the logs": report.digest[:16],
    }
