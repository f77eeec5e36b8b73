"""`report.html`: the whole run on one page that opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from pagedkv.simulations.metrics import latencies
from pagedkv.simulations.reports.distribution_figures import draw_distributions
from pagedkv.simulations.reports.figure import Figure, to_json
from pagedkv.simulations.reports.quantities import UNDEFINED, to_count, to_duration, to_rate, to_share
from pagedkv.simulations.reports.table import LATENCIES, STATISTICS
from pagedkv.simulations.reports.time_figures import TimeFigures
from pagedkv.simulations.run import Run

__all__ = ["write_page"]

MAX_REASONS = 20
NUM_SLOWEST = 10

_CHIEF_SETTINGS = (
    *("model", "device", "num_devices", "block_size", "num_blocks", "num_host_blocks", "prefix_caching", "eviction"),
    *("policy", "preemption", "max_num_batched_tokens", "max_num_running", "rate_scale", "session_gap_s"),
)


def write_page(run: Run, summary: Mapping[str, Any], path: Path) -> Path:
    """Write the page and return `path`. O(steps + requests log requests).

    plotly's own script is copied into the page, 5 MB, and nothing is fetched: its content policy forbids it. All that
    comes from the trace and the configuration is escaped. Wall-clock times stand in the footer only, so that two runs
    of the same thing differ there alone.
    """
    figures = TimeFigures(run).draw() + draw_distributions(run)
    body = "\n".join(
        [
            _header(run),
            _cards(run, summary),
            _tables(summary),
            _figures(figures),
            _rejections(run),
            _slowest(run),
            _footer(summary),
        ]
    )
    drawn = [
        {"key": figure.key, "data": figure.data, "layout": figure.layout, "has_time_axis": figure.has_time_axis}
        for figure in figures
    ]
    template = files("pagedkv.simulations.reports").joinpath("report_template.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(f"{run.trace.name} - pagedkv"),
        body=body,
        figures=to_json(drawn),
        # Read from plotly's data: importing plotly's figures would take half a second and add nothing.
        plotly=files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8"),
    )
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _header(run: Run) -> str:
    trace = run.trace
    chief = [(key, run.configuration[key]) for key in _CHIEF_SETTINGS if run.configuration.get(key) is not None]
    costs = run.configuration.get("cost_model", {})
    if run.configuration.get("model") is None and "name" in costs:
        chief.insert(0, ("cost_model", costs["name"]))
    chips = "".join(f"<li><span>{escape(key)}</span> {escape(_to_text(value))}</li>" for key, value in chief)
    settings = _table(("setting", "value"), _flat(run.configuration), has_text=True)
    return (
        '<header><p class="kicker">pagedkv replay <span class="badge">simulated, not measured</span></p>'
        f"<h1>{escape(trace.name)}</h1>"
        f'<p class="muted">{to_count(len(trace))} requests, format {escape(trace.format)}, '
        f"sha256 <code>{escape(trace.digest)}</code></p>"
        f'<ul class="chips">{chips}</ul>'
        f'<details><summary>Whole configuration</summary><div class="panel">{settings}</div></details></header>'
    )


def _cards(run: Run, summary: Mapping[str, Any]) -> str:
    ttft, tpot, e2e = summary["ttft_s"], summary["tpot_s"], summary["e2e_s"]
    num_preempted = int(np.count_nonzero(run.requests.num_preemptions))
    num_rejected = summary["num_rejected"]
    has_content = run.trace.content_block_size is not None or summary["prefix_hit_tokens"] > 0
    swaps = f", {to_count(summary['num_swaps'])} by swapping" if summary["num_swaps"] else ""
    cards = [
        ("TTFT, median", to_duration(ttft["p50"]), _p99(ttft), False),
        ("TPOT, median", to_duration(tpot["p50"]), _p99(tpot), False),
        ("E2E, median", to_duration(e2e["p50"]), _p99(e2e), False),
        (
            "Output",
            _per_second(summary["output_token_throughput"], "tok"),
            _per_second(summary["request_throughput"], "requests"),
            False,
        ),
        (
            "Finished",
            to_count(summary["num_finished"]),
            f"of {to_count(summary['num_requests'])}, {to_count(num_rejected)} rejected",
            num_rejected > 0,
        ),
        (
            "Preemptions",
            to_count(summary["num_preemptions"]),
            f"in {to_count(num_preempted)} requests{swaps}",
            summary["num_preemptions"] > 0,
        ),
        (
            "KV utilisation, mean",
            to_share(summary["kv_utilization_mean"]),
            "" if summary["kv_utilization_max"] is None else f"max {to_share(summary['kv_utilization_max'])}",
            False,
        ),
        (
            "Prefix hit ratio",
            to_share(summary["prefix_hit_ratio"]),
            f"{to_count(summary['prefix_hit_tokens'])} tokens" if has_content else "the trace names no shared prompts",
            False,
        ),
    ]
    items = (
        f'<div class="card{" alert" if is_alert else ""}"><dt>{name}</dt>'
        f'<dd class="value">{value}</dd><dd class="note">{note}</dd></div>'
        for name, value, note, is_alert in cards
    )
    return f'<dl class="cards">{"".join(items)}</dl>'


def _p99(latency: Mapping[str, float | None]) -> str:
    return "" if latency["p99"] is None else f"p99 {to_duration(latency['p99'])}"


def _per_second(rate: float | None, what: str) -> str:
    return UNDEFINED if rate is None else f"{to_rate(rate)} {what}/s"


def _tables(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{name} <span class="muted">{meaning}</span></th>'
        + "".join(f"<td>{to_duration(summary[key][statistic])}</td>" for statistic in STATISTICS)
        + "</tr>"
        for key, name, meaning in LATENCIES
    )
    heads = "".join(f"<th>{head}</th>" for head in ("", *STATISTICS))
    latency_table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    totals = _table(
        ("", ""),
        [
            ("Makespan", to_duration(summary["makespan_s"])),
            ("Steps", to_count(summary["num_steps"])),
            ("Prompt tokens", to_count(summary["prompt_tokens"])),
            ("Output tokens", to_count(summary["output_tokens"])),
            ("Prefix hit tokens", to_count(summary["prefix_hit_tokens"])),
        ],
    )
    return (
        f'<h2>Summary</h2><div class="columns uneven"><div class="panel"><h3>Latencies</h3>{latency_table}</div>'
        f'<div class="panel"><h3>Totals</h3>{totals}</div></div>'
    )


def _figures(figures: Iterable[Figure]) -> str:
    shown = [
        f'<figure class="{"wide" if figure.is_wide else "half"}"><h3>{escape(figure.title)}</h3>'
        f'<div class="plot rows-{figure.num_rows}" '
        f'id="plot-{figure.key}" role="img" aria-label="{escape(figure.title)}"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    ]
    if not shown:
        return '<h2>Figures</h2><p class="muted">No step took any time, so there is nothing to draw.</p>'
    note = (
        "Drag to zoom; zooming one figure over time zooms the others; double-click to see all. "
        "<noscript>The figures need JavaScript.</noscript>"
    )
    return f'<h2>Figures</h2><p class="muted" style="margin-bottom: 12px">{note}</p><div class="columns">{"".join(shown)}</div>'


def _rejections(run: Run) -> str:
    if not run.rejections:
        return ""
    shown = sorted(run.rejections.items())[:MAX_REASONS]
    num_more = len(run.rejections) - len(shown)
    more = f'<p class="muted">{to_count(num_more)} more are in requests.csv.</p>' if num_more else ""
    table = _table(("request", "reason"), [(to_count(request), reason) for request, reason in shown], has_text=True)
    return f'<h2>Rejected requests: {to_count(len(run.rejections))}</h2><div class="panel">{table}{more}</div>'


def _slowest(run: Run) -> str:
    trace, log, by_request = run.trace, run.requests, latencies(run)
    ttft = np.nan_to_num(by_request["ttft_s"], nan=-1.0)
    order = np.lexsort((np.arange(len(ttft)), -ttft))[:NUM_SLOWEST]
    rows = [
        (
            to_count(request),
            to_duration(float(trace.arrival_s[request])),
            to_count(trace.prompt_tokens[request]),
            to_count(log.num_output[request]),
            *(to_duration(float(by_request[name][request])) for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s")),
            to_count(log.num_preemptions[request]),
        )
        for request in order.tolist()
        if ttft[request] >= 0
    ]
    if not rows:
        return ""
    heads = ("request", "arrival", "prompt", "output", "queue", "TTFT", "TPOT", "E2E", "preempted")
    return f'<h2>Slowest to the first token</h2><div class="panel">{_table(heads, rows)}</div>'


def _footer(summary: Mapping[str, Any]) -> str:
    return (
        f'<footer id="wall-clock">Replayed in {to_duration(summary["wall_s"])} of wall-clock time, '
        f"{to_rate(summary['requests_per_wall_s'])} requests per second. All other figures are simulated, and are the same "
        "in every run of this trace with this configuration.</footer>"
    )


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], *, has_text: bool = False) -> str:
    """A table whose first column is a name; with `has_text` the others are prose, not numbers. Escapes every cell."""
    kind = ' class="text"' if has_text else ""
    names = "".join(f"<th{kind}>{escape(head)}</th>" for head in heads)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as one list, with dotted names."""
    lines: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        lines += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _to_text(value))]
    return lines


def _to_text(value: Any) -> str:
    if value is None:
        return UNDEFINED
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
