"""The summary of a run as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedkv.simulations.reports.quantities import to_count, to_duration, to_rate, to_share
from pagedkv.simulations.run import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["LATENCIES", "STATISTICS", "print_summary"]

MAX_REASONS = 3
GIB = 2**30

LATENCIES = (
    ("ttft_s", "TTFT", "to first token"),
    ("tpot_s", "TPOT", "per later token"),
    ("itl_s", "ITL", "between tokens"),
    ("e2e_s", "E2E", "to last token"),
    ("queue_s", "queue", "to admission"),
)
"""Keys of the summary, and what every report calls them."""
STATISTICS = ("mean", "p50", "p90", "p99", "max")


def print_summary(
    run: Run,
    summary: Mapping[str, Any],
    paths: Mapping[str, Path] | None = None,
    console: Console | None = None,
) -> None:
    """Print what `summarize(run)` gave: latencies, counts, the first reasons of refusals, and where the reports are.

    Fits 80 columns. `console` is where to print; by default standard output.
    """
    # Imported here because it takes a while, and whoever writes files only does not need it.
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False) if console is None else console
    trace = run.trace
    console.print(Text.assemble((trace.name, "bold"), f"  {to_count(len(trace))} requests, simulated"), soft_wrap=True)
    console.print(_latency_table(summary))
    console.print(_count_table(summary))
    console.print(Text(_memory(run)), soft_wrap=True)
    for line in _rejections(run):
        console.print(Text(line), soft_wrap=True)
    for path in (paths or {}).values():
        console.print(Text(f"wrote {path}", style="dim"), soft_wrap=True)


def _latency_table(summary: Mapping[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("latency", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    for statistic in STATISTICS:
        table.add_column(statistic, justify="right", no_wrap=True)
    for key, name, meaning in LATENCIES:
        table.add_row(name, meaning, *(to_duration(summary[key][statistic]) for statistic in STATISTICS))
    return table


def _count_table(summary: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    cells = _counts(summary)
    half = (len(cells) + 1) // 2
    for left, right in zip(cells[:half], [*cells[half:], ("", "")], strict=False):
        table.add_row(*left, *right)
    return table


def _counts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    preemptions = to_count(summary["num_preemptions"])
    if summary["num_swaps"]:
        preemptions += f" (swaps: {to_count(summary['num_swaps'])})"
    return [
        ("requests finished", to_count(summary["num_finished"])),
        ("requests rejected", to_count(summary["num_rejected"])),
        ("preemptions", preemptions),
        ("prompt tokens", to_count(summary["prompt_tokens"])),
        ("output tokens", to_count(summary["output_tokens"])),
        ("prefix hit tokens", to_count(summary["prefix_hit_tokens"])),
        ("prefix hit ratio", to_share(summary["prefix_hit_ratio"])),
        ("makespan", to_duration(summary["makespan_s"])),
        ("requests per second", to_rate(summary["request_throughput"])),
        ("output tokens per second", to_rate(summary["output_token_throughput"])),
        ("KV utilisation, mean", to_share(summary["kv_utilization_mean"])),
        ("KV utilisation, max", to_share(summary["kv_utilization_max"])),
        ("steps", to_count(summary["num_steps"])),
        ("replayed in (wall time)", to_duration(summary["wall_s"])),
    ]


def _memory(run: Run) -> str:
    """How large the K/V memory was; in bytes where the cost model's presets say what a token takes."""
    text = f"KV memory  {to_count(run.num_blocks)} blocks"
    costs, block_size = run.configuration.get("cost_model", {}), run.configuration.get("block_size")
    if block_size is not None:
        text += f" of {block_size} tokens"
    if "block_bytes" in costs and costs["block_size"] == block_size:
        each = f" on each of {costs['num_devices']} devices" if costs["num_devices"] > 1 else ""
        text += f" ({run.num_blocks * costs['block_bytes'] / GIB:.1f} GiB{each})"
    return text


def _rejections(run: Run) -> list[str]:
    if not run.rejections:
        return []
    reasons = [reason for _, reason in sorted(run.rejections.items())]
    lines = [f"{to_count(len(reasons))} of {to_count(len(run.trace))} requests rejected:"]
    lines += [f"  {reason}" for reason in reasons[:MAX_REASONS]]
    num_more = len(reasons) - MAX_REASONS
    return ["", *lines, f"  and {to_count(num_more)} more, see requests.csv"] if num_more > 0 else ["", *lines]
