"""Figures over the time of the trace: memory, requests, tokens, steps, first tokens, prefix hits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.metrics import latencies
from pagedkv.simulations.reports.figure import Figure, legend_above, seconds_axis
from pagedkv.simulations.reports.quantities import time_unit, to_count, to_duration, to_share
from pagedkv.simulations.reports.timeline import Timeline
from pagedkv.simulations.run import Run

__all__ = ["MAX_BARS", "MAX_INTERVALS", "TimeFigures"]

MAX_INTERVALS = 1_000
MAX_BARS = 120

Floats = NDArray[np.float64]


class TimeFigures:
    """Draws a run over time. Nothing is left out silently: each caption says what a point of the line stands for."""

    __slots__ = ("_coarse", "_edges", "_unit", "_unit_s", "run", "timeline")

    def __init__(self, run: Run) -> None:
        self.run = run
        start = float(run.trace.arrival_s[0])
        self.timeline = Timeline(run.steps, start_s=start, max_intervals=MAX_INTERVALS)
        self._coarse = Timeline(run.steps, start_s=start, max_intervals=2 * MAX_BARS)
        edges = self.timeline.edges_s
        self._unit_s, self._unit = time_unit(float(edges[-1]) if len(self.timeline) else 0.0)
        self._edges = edges / self._unit_s

    def draw(self) -> list[Figure]:
        """All figures that have something to show, in the order of the page; none for a run that took no time."""
        if not len(self.timeline):
            return []
        found = [self.utilization(), self.requests(), self.ttft(), self.tokens(), self.prefix_hits()]
        return [figure for figure in (*found, self.step_sizes(), self.step_durations()) if figure is not None]

    def utilization(self) -> Figure:
        """Share of the device's blocks in use."""
        shares = self.run.steps.column("num_used_blocks") / self.run.num_blocks
        peak = float(shares.max())
        caption = (
            f"Blocks held by running requests, of {to_count(self.run.num_blocks)}. Peak {to_share(peak)} "
            f"({to_count(round(peak * self.run.num_blocks))} blocks). Flat at the top: memory is what limits the load, and "
            f"requests wait or are preempted. Far below it: room for a larger load. Blocks kept only for reuse do not "
            f"count. {_resolution(self.timeline)}"
        )
        top = 1.02 if peak > 0.5 else 1.1 * peak
        axis = {
            "title": {"text": "blocks in use (%)"},
            "tickformat": ".0%" if peak > 0.05 else ".2%",
            "range": [0, top],
        }
        data = self._mean_and_maximum(shares, name="in use", color="@blue", form=".2%")
        return Figure("utilization", "KV utilisation", caption, data, self._layout(yaxis=axis))

    def requests(self) -> Figure:
        """Running requests; below them those that wait, and the preemptions, where there are any."""
        steps = self.run.steps
        running, waiting = steps.column("num_rows"), steps.column("num_waiting")
        rows = [("running", self._mean_and_maximum(running, name="running", color="@blue", form=",.1f"))]
        if waiting.any():
            rows.append(("waiting", self._mean_and_maximum(waiting, name="waiting", color="@orange", form=",.1f")))
        if self.run.preemptions:
            rows.append(("preemptions", self._preemptions()))
        data, layout = self._stack(rows)
        caption = (
            f"Requests with tokens in the step, at most {to_count(running.max())}, and those that waited for a seat, at "
            f"most {to_count(waiting.max())}. Waiting that keeps rising is overload. {_resolution(self.timeline)} "
            f"{self._about_preemptions()}"
        )
        title = f"Requests: {', '.join(name for name, _ in rows)}"
        return Figure("requests", title, caption, data, layout, num_rows=len(rows))

    def _preemptions(self) -> list[dict[str, Any]]:
        edges = self._bar_edges()
        times = np.array([event.time for event in self.run.preemptions])
        is_swap = np.array([event.mode == "swap" for event in self.run.preemptions])
        kinds = (("preempted, to recompute", "@red", ~is_swap), ("preempted, swapped out", "@violet", is_swap))
        return [
            self._bars(name, edges, np.histogram(times[chosen], edges)[0], color=color)
            for name, color, chosen in kinds
            if chosen.any()
        ]

    def _about_preemptions(self) -> str:
        if not self.run.preemptions:
            return "No request was preempted."
        edges = self._bar_edges()
        return (
            f"Bars: preemptions, {to_count(len(self.run.preemptions))} in all, those within {to_duration(edges[1] - edges[0])} "
            f"together. Each is work done twice, or moved; many in a row mean that too many requests were admitted."
        )

    def tokens(self) -> Figure:
        """Tokens computed per second, prompt chunks apart from the rest."""
        steps = self.run.steps
        rows = steps.column("num_rows")
        coarse = self._coarse
        bands = (
            ("one per request and step: decoding", coarse.rate(rows), "@blue"),
            ("beyond that: prompts", coarse.rate(steps.column("num_tokens") - rows), "@orange"),
        )
        data = [
            {**self._line(name, values, color=color, form=",.0f", edges=coarse.edges_s), "stackgroup": "tokens"}
            for name, values, color in bands
        ]
        for band in data:
            band["line"] = {**band["line"], "width": 0.5}
        resolution = "Every step is drawn." if coarse.is_exact else f"Mean of each {to_duration(coarse.interval_s)}."
        caption = (
            "A decoding request computes one token in a step; all tokens beyond one per request belong to prompts. So the "
            "lower band is decoding, with one token of each prompt chunk, and the upper one prefill. Where the upper one "
            f"is high and the lower one dips, prefill holds decoding up. {resolution}"
        )
        axis = {"title": {"text": "tokens computed per second"}, "rangemode": "tozero"}
        return Figure("tokens", "Tokens computed", caption, data, self._layout(yaxis=axis))

    def step_sizes(self) -> Figure:
        """Tokens in a step."""
        tokens = self.run.steps.column("num_tokens")
        caption = (
            f"Largest step: {to_count(tokens.max())} tokens. A flat top is the token budget: prompts are cut into chunks. "
            f"{_resolution(self._coarse, 'mean of the steps')}"
        )
        layout = self._layout(yaxis={"title": {"text": "tokens per step"}, "rangemode": "tozero"})
        data = self._of_steps(tokens, form=",.0f")
        return Figure("step-sizes", "Tokens per step", caption, data, layout, is_wide=False)

    def step_durations(self) -> Figure:
        """How long steps took."""
        durations = self.run.steps.column("duration_s")
        caption = (
            f"Longest step: {to_duration(float(durations.max()))}. All who decode wait that long for one token, so spikes "
            f"are what users see as stutter. {_resolution(self._coarse, 'mean of the steps')}"
        )
        layout = self._layout(yaxis={"title": {"text": "step duration (ms)"}, "rangemode": "tozero"})
        data = self._of_steps(1e3 * durations, form=",.2f")
        return Figure("step-durations", "Step duration", caption, data, layout, is_wide=False)

    def ttft(self) -> Figure | None:
        """Time to first token of the requests that arrived in each stretch of time."""
        ttft = latencies(self.run)["ttft_s"]
        defined = ~np.isnan(ttft)
        if not (ttft[defined] > 0).any():
            return None
        num_bars = int(np.clip(np.count_nonzero(defined) // 20, 1, MAX_BARS))
        edges = self._bar_edges(num_bars)
        bins = np.clip(edges.searchsorted(self.run.trace.arrival_s[defined], side="right") - 1, 0, num_bars - 1)
        rows = _quantiles_by_bin(ttft[defined], bins, num_bars)
        names = (("median", "@blue"), ("p90", "@violet"), ("slowest", "@orange"))
        data = [
            {**self._line(name, row, color=color, form=".3s", edges=edges), "hovertemplate": "%{y:.3s}s"}
            for (name, color), row in zip(names, rows, strict=True)
        ]
        caption = (
            f"By time of arrival, requests of {to_duration(edges[1] - edges[0])} together; gaps where none arrived. Median "
            f"and slowest apart: long prompts, or a queue. All rising together: overload."
        )
        axis = seconds_axis("time to first token (log scale)", *rows)
        return Figure("ttft", "Time to first token, by arrival", caption, data, self._layout(yaxis=axis))

    def prefix_hits(self) -> Figure | None:
        """Prompt tokens found in the prefix cache and computed, by time of first admission."""
        log, prompts = self.run.requests, self.run.trace.prompt_tokens
        if not log.num_hit.any():
            return None
        is_admitted = ~np.isnan(log.admitted_s)
        times, hits, prompts = log.admitted_s[is_admitted], log.num_hit[is_admitted], prompts[is_admitted]
        edges = self._bar_edges()
        hit_sums, prompt_sums = (np.histogram(times, edges, weights=column)[0] for column in (hits, prompts))
        so_far = np.cumsum(hit_sums) / np.maximum(np.cumsum(prompt_sums), 1)
        bars = [
            self._bars("hit", edges, hit_sums, color="@blue"),
            self._bars("to be computed", edges, prompt_sums - hit_sums, color="@grey"),
        ]
        line = self._line("hit ratio so far", so_far, color="@green", form=".1%", edges=edges)
        data, layout = self._stack([("prompt tokens", bars), ("hit ratio (%)", [line])])
        layout["yaxis2"]["tickformat"] = ".0%" if so_far.max() > 0.05 else ".2%"
        caption = (
            f"Prompt tokens of the requests first admitted in each {to_duration(edges[1] - edges[0])}: "
            f"{to_count(hits.sum())} of {to_count(prompts.sum())} were in the cache ({to_share(hits.sum() / prompts.sum())}). "
            f"A ratio that falls while the load is steady means that blocks are evicted before they are asked for again."
        )
        return Figure("prefix-hits", "Prefix hits", caption, data, layout, num_rows=2)

    def _bar_edges(self, num_bars: int = MAX_BARS) -> Floats:
        """Edges of equally long stretches from the first arrival to the end. (num_bars + 1,) seconds."""
        edges = self.timeline.edges_s
        return np.linspace(edges[0], edges[-1], num_bars + 1)

    def _stack(self, rows: list[tuple[str, list[dict[str, Any]]]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Plots one above the other over one time axis, each with the title of its y axis and its traces."""
        layout = self._layout(barmode="stack")
        layout["xaxis"]["anchor"] = f"y{len(rows)}" if len(rows) > 1 else "y"
        height = 1 / (len(rows) + 0.2 * (len(rows) - 1))
        data: list[dict[str, Any]] = []
        for row, (title, traces) in enumerate(rows):
            name = f"y{row + 1}" if row else "y"
            top = 1 - row * 1.2 * height
            axis = {"title": {"text": title}, "rangemode": "tozero", "domain": [max(top - height, 0.0), top]}
            layout[name.replace("y", "yaxis")] = axis
            data += [{**trace, "yaxis": name} for trace in traces]
        return data, layout

    def _layout(self, **parts: Any) -> dict[str, Any]:
        span = [float(self._edges[0]), float(self._edges[-1])]
        axis = {"title": {"text": f"time ({self._unit})"}, "range": span}
        return {"xaxis": axis, "legend": legend_above(), "hovermode": "x unified", **parts}

    def _line(self, name: str, values: Floats, *, color: str, form: str, edges: Floats | None = None) -> dict[str, Any]:
        """A line of steps through one value per interval; `edges` in seconds, by default the timeline's."""
        x = self._edges if edges is None else edges / self._unit_s
        if np.isnan(values).any():
            # Both ends of each interval: plotly's own steps would not draw the interval before a gap.
            x, y, shape = np.repeat(x, 2)[1:-1], np.repeat(values, 2), "linear"
        else:
            y, shape = np.append(values, values[-1:]), "hv"
        return {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": x,
            "y": y.astype(np.float32),  # More than a screen can show.
            "line": {"shape": shape, "width": 1.5, "color": color},
            "hovertemplate": f"%{{y:{form}}}",
        }

    def _mean_and_maximum(self, values: Floats, *, name: str, color: str, form: str) -> list[dict[str, Any]]:
        """The mean over time before a shade up to the maximum; one line where both are the same."""
        timeline = self.timeline
        line = self._line(name, timeline.mean(values), color=color, form=form)
        if timeline.is_exact:
            return [line]
        return [
            self._shade(f"{name}, max", timeline.maximum(values), color=color, form=form),
            {**line, "name": f"{name}, mean"},
        ]

    def _of_steps(self, values: Floats, *, form: str) -> list[dict[str, Any]]:
        """The mean of the steps before a shade up to the maximum, in fewer intervals: for half the width."""
        coarse = self._coarse
        line = self._line("mean", coarse.mean_of_steps(values), color="@blue", form=form, edges=coarse.edges_s)
        if coarse.is_exact:
            return [{**line, "name": "each step"}]
        return [self._shade("max", coarse.maximum(values), color="@blue", form=form, edges=coarse.edges_s), line]

    def _shade(
        self, name: str, values: Floats, *, color: str, form: str, edges: Floats | None = None
    ) -> dict[str, Any]:
        line = self._line(name, values, color=f"{color}-faint", form=form, edges=edges)
        return {**line, "fill": "tozeroy", "fillcolor": f"{color}-faint"}

    def _bars(self, name: str, edges: Floats, counts: NDArray[Any], *, color: str) -> dict[str, Any]:
        return {
            "type": "bar",
            "name": name,
            "x": (edges[:-1] + edges[1:]) / 2 / self._unit_s,
            "y": counts.astype(np.float64),
            "width": float(edges[1] - edges[0]) / self._unit_s,
            "marker": {"color": color, "line": {"width": 0}},
            "hovertemplate": "%{y:,.0f}",
        }


def _resolution(timeline: Timeline, mean: str = "mean over time, idle time counting as zero") -> str:
    if timeline.is_exact:
        return "Every step is drawn."
    return f"Line: {mean}; shade: maximum; both within each {to_duration(timeline.interval_s)}."


def _quantiles_by_bin(values: Floats, bins: NDArray[np.int64], num_bins: int) -> list[Floats]:
    """Median, 90th percentile (nearest rank) and maximum of the values in each bin, NaN where empty. O(n log n)."""
    ordered = np.append(values[np.lexsort((values, bins))], np.nan)
    counts = np.bincount(bins, minlength=num_bins)
    firsts = np.cumsum(counts) - counts
    ranks = (np.ceil(counts * level).astype(np.int64) for level in (0.5, 0.9, 1.0))
    return [ordered[np.where(counts > 0, firsts + rank - 1, len(values))] for rank in ranks]
