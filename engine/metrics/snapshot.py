"""All metrics at one moment, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagedkv.engine.metrics.histograms import HistogramSnapshot
from pagedkv.engine.metrics.names import COUNTERS, GAUGES, HISTOGRAMS

__all__ = ["MetricsSnapshot"]


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Every metric at one moment; `docs/serving_metrics.md` says what each means. Counters count since the start.

    `request_success` maps the finish reason, "stop", "length" or "abort", to the number of samples.
    """

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_perc: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    spec_decode_num_drafts: int
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
    num_requests_refused: int
    num_failed_steps: int
    num_drafter_errors: int
    request_success: Mapping[str, int]
    time_to_first_token_seconds: HistogramSnapshot
    inter_token_latency_seconds: HistogramSnapshot
    e2e_request_latency_seconds: HistogramSnapshot
    request_queue_time_seconds: HistogramSnapshot
    request_prefill_time_seconds: HistogramSnapshot
    request_decode_time_seconds: HistogramSnapshot
    iteration_tokens_total: HistogramSnapshot
    request_prompt_tokens: HistogramSnapshot
    request_generation_tokens: HistogramSnapshot
    step_time_seconds: HistogramSnapshot

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Share of the queried tokens that were found; None before the first query."""
        return self.prefix_cache_hits / self.prefix_cache_queries if self.prefix_cache_queries else None

    def as_dict(self) -> dict[str, Any]:
        """The metrics by name, ready for JSON; a histogram has `count`, `sum`, `bounds` and `counts`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in (*GAUGES, *COUNTERS)}
        values["request_success"] = dict(self.request_success)
        for name in HISTOGRAMS:
            histogram: HistogramSnapshot = getattr(self, name)
            values[name] = {
                "count": histogram.count,
                "sum": histogram.total,
                "bounds": list(histogram.bounds),
                "counts": list(histogram.counts),
            }
        return values
