"""`pagedkv cache`: what prefix caches of several sizes and policies would hit on a trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pagedkv import TraceError
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.eviction import POLICY_NAMES, make_policy
from pagedkv.simulations.cache_pass import CachePass, replay_cache
from pagedkv.simulations.offline_optimum import offline_optimum
from pagedkv.simulations.progress import progress_bar
from pagedkv.simulations.reports.quantities import to_count
from pagedkv.simulations.traces import Trace, load_trace
from pagedkv.simulations.traces.content import leading_hits

__all__ = ["cache"]

DEFAULT_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
LOOKUP_S = 1.5e-6
REQUEST_S = 5e-5
"""What a pass costs for each block looked up and each request, within a factor of three or so: told before it starts."""
SHORT_S = 2.0


def cache(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace that names shared blocks.", show_default=False)
    ],
    capacity: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks of the trace's own size; repeat for several. Default: 1, 3, 10, 30, 100 % of all.",
            min=0,
            max=MAX_NUM_BLOCKS,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Pass over the first N requests only.", metavar="N", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the share of prompt blocks that a prefix cache would hit, by eviction policy and capacity.

    No scheduler and no time: requests one after the other. MIN is the most that any policy could hit; the infinite cache is
    the ceiling of both. One pass over the trace for each policy and capacity: many minutes for tens of millions of blocks.
    What is expected to take longer than a moment is told first, on standard error; each row is printed when it is there.
    """
    requests = load_trace(trace)
    if limit is not None:
        requests = requests.head(limit)
    if requests.content_block_size is None:
        raise TraceError(f"{trace}: expected a trace that names shared blocks, found none named")
    num_lookups = int(requests.num_content_ids().sum())
    num_hits = int(leading_hits(requests.run_starts, requests.run_counts, requests.run_offsets).sum())
    num_distinct, ceiling = num_lookups - num_hits, num_hits / num_lookups
    capacities = capacity or [max(1, round(share * num_distinct)) for share in DEFAULT_SHARES]
    _tell_effort(num_lookups, len(requests), len(capacities))
    ratios = _hit_ratios(requests, capacities)
    if as_json:
        content = {"trace": requests.name, "block_size": requests.content_block_size, "capacities": capacities}
        content |= {"hit_ratios": dict(ratios), "infinite": ceiling, "num_distinct_blocks": num_distinct}
        typer.echo(json.dumps(content))
    else:
        _print(requests, capacities, ratios)
        block_size = requests.content_block_size
        typer.echo(f"infinite cache: {ceiling:.4f} ({num_distinct:,} distinct blocks of {block_size} tokens)")


def _tell_effort(num_lookups: int, num_requests: int, num_capacities: int) -> None:
    """Say on standard error, a terminal or not, what lies ahead if it will take a while."""
    num_passes = (len(POLICY_NAMES) + 1) * num_capacities
    expected_s = num_passes * (num_lookups * LOOKUP_S + num_requests * REQUEST_S)
    if expected_s > SHORT_S:
        time = f"{expected_s:.0f} s" if expected_s < 100 else f"{expected_s / 60:.0f} min"
        blocks, passes = to_count(num_lookups), to_count(num_passes)
        typer.echo(f"{blocks} blocks to look up, in each of {passes} passes: roughly {time}", err=True)


def _hit_ratios(trace: Trace, capacities: list[int]) -> Iterator[tuple[str, list[float]]]:
    """Yield a policy's name and hit ratios by capacity when they are there, MIN last. Shows passes as they end."""
    ids = [trace.content_ids(i) for i in range(len(trace))]
    passes: dict[str, Callable[[int], CachePass]] = {
        name: partial(replay_cache, ids, policy=partial(make_policy, name)) for name in POLICY_NAMES
    }
    passes["MIN"] = partial(offline_optimum, ids)
    for name, replay in passes.items():
        ratios = []
        # A bar for each row: one that spans rows would be drawn over what is printed meanwhile.
        with progress_bar(f"passing over the trace, {name}", len(capacities)) as progress:
            for size in capacities:
                ratios.append(replay(size).hit_ratio)
                if progress is not None:
                    progress(len(ratios))
        yield name, ratios


def _print(trace: Trace, capacities: list[int], ratios: Iterator[tuple[str, list[float]]]) -> None:
    """Print the table row by row."""
    heads = [f"{size:,}" for size in capacities]
    widths = [max(len(head), 6) for head in heads]

    def show(name: str, cells: list[str]) -> None:
        typer.echo("  ".join([f"{name:<7}", *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]))
        sys.stdout.flush()

    typer.echo(f"{trace.name}: share of prompt blocks hit\n")
    show("blocks", heads)
    for name, row in ratios:
        show(name, [f"{ratio:.4f}" for ratio in row])
    typer.echo()
