"""What a serving engine counts: requests, tokens, latencies, the cache. Fed by scheduler events and steps, no torch."""

from pagedkv.engine.metrics.engine_metrics import EngineMetrics
from pagedkv.engine.metrics.histograms import Histogram, HistogramSnapshot
from pagedkv.engine.metrics.prometheus import PrometheusExporter
from pagedkv.engine.metrics.snapshot import MetricsSnapshot

__all__ = ["EngineMetrics", "Histogram", "HistogramSnapshot", "MetricsSnapshot", "PrometheusExporter"]
