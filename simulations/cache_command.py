"""`pagedkv cache`: what prefix caches of several sizes and policies would hit on a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from pagedkv import TraceError
from pagedkv.eviction import POLICY_NAMES, make_policy
from pagedkv.simulations.cache_pass import CachePass, num_distinct_blocks, replay_cache
from pagedkv.simulations.offline_optimum import offline_optimum
from pagedkv.simulations.progress import progress_bar
from pagedkv.simulations.traces import Trace, load_trace

__all__ = ["cache"]

DEFAULT_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


def cache(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace that names shared blocks.", show_default=False)
    ],
    capacity: Annotated[
        list[int] | None,
        typer.Option(help="Blocks of the trace's own size; repeat for several. Default: 1, 3, 10, 30, 100 % of all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the share of prompt blocks that a prefix cache would hit, by eviction policy and capacity.

    No scheduler and no time: requests one after the other. MIN is the most that any policy could hit; the infinite cache is
    the ceiling of both. One pass over the trace for each policy and capacity: a minute or more for millions of blocks; on a
    terminal a bar shows how far it is.
    """
    requests = load_trace(trace)
    if requests.content_block_size is None:
        raise TraceError(f"{trace}: expected a trace that names shared blocks, found none named")
    ids = [requests.content_ids(i) for i in range(len(requests))]
    num_distinct = num_distinct_blocks(ids)
    capacities = capacity or [max(1, round(share * num_distinct)) for share in DEFAULT_SHARES]
    ratios, ceiling = _hit_ratios(ids, capacities, num_distinct)
    if as_json:
        content = {"trace": requests.name, "block_size": requests.content_block_size, "capacities": capacities}
        typer.echo(
            json.dumps({**content, "hit_ratios": ratios, "infinite": ceiling, "num_distinct_blocks": num_distinct})
        )
    else:
        _print(requests, capacities, ratios, ceiling, num_distinct)


def _hit_ratios(
    ids: list[NDArray[np.int64]], capacities: list[int], num_distinct: int
) -> tuple[dict[str, list[float]], float]:
    """Hit ratios by policy, MIN the last of them, and the infinite cache's. Shows passes over the trace as they end."""
    passes: dict[str, Callable[[int], CachePass]] = {
        name: partial(replay_cache, ids, policy=partial(make_policy, name)) for name in POLICY_NAMES
    }
    passes["MIN"] = partial(offline_optimum, ids)
    ratios: dict[str, list[float]] = {name: [] for name in passes}
    with progress_bar("passing over the trace", len(passes) * len(capacities) + 1) as progress:
        for num_done, (name, size) in enumerate(product(passes, capacities), start=1):
            ratios[name].append(passes[name](size).hit_ratio)
            if progress is not None:
                progress(num_done)
        return ratios, offline_optimum(ids, num_distinct).hit_ratio


def _print(
    trace: Trace, capacities: list[int], ratios: dict[str, list[float]], ceiling: float, num_distinct: int
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("blocks")
    for size in capacities:
        table.add_column(f"{size:,}", justify="right")
    for name, row in ratios.items():
        table.add_row(name, *(f"{ratio:.4f}" for ratio in row))
    console = Console(highlight=False)
    console.print(f"{trace.name}: share of prompt blocks hit", soft_wrap=True, markup=False)
    console.print(table)
    block_size = trace.content_block_size
    console.print(
        f"infinite cache: {ceiling:.4f} ({num_distinct:,} distinct blocks of {block_size} tokens)", soft_wrap=True
    )
