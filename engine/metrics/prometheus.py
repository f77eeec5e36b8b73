"""The metrics in Prometheus' exposition format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pagedkv.engine.metrics.names import COUNTERS, FINISHED_REASON, GAUGES, HISTOGRAMS
from pagedkv.engine.metrics.snapshot import MetricsSnapshot
from pagedkv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import HistogramMetricFamily, Metric

__all__ = ["PrometheusExporter"]

LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


class PrometheusExporter:
    """A collector of prometheus_client: each scrape takes one snapshot of the metrics, so its numbers belong together.

    Names are `prefix` and the metric's name; `prefix="vllm:"` gives vLLM's, so that its dashboards work. They also ask
    for the labels `model_name` and `engine`.

        exporter = PrometheusExporter(llm.metrics, prefix="vllm:", labels={"model_name": "Qwen3-0.6B", "engine": "0"})
        respond(exporter.text(), content_type=exporter.content_type)
    """

    def __init__(
        self,
        metrics: Callable[[], MetricsSnapshot],
        prefix: str = "pagedkv:",
        registry: CollectorRegistry | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`metrics` is called for each scrape: `llm.metrics`. Registers itself with `registry`, or with one of its own.

        Raises ModuleNotFoundError without prometheus_client, InvalidArgumentError for names that Prometheus refuses,
        and prometheus_client's ValueError if the registry has these names already.
        """
        _need_prometheus_client()
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

        if not PREFIX.fullmatch(prefix):
            raise InvalidArgumentError(f"prefix must begin a name of letters, digits, '_' and ':', found {prefix!r}")
        self._labels = dict(labels or {})
        for name, value in self._labels.items():
            if not LABEL.fullmatch(name) or name.startswith("__") or name in (FINISHED_REASON, "le"):
                raise InvalidArgumentError(f"{name!r} cannot be a label")
            if not isinstance(value, str):
                raise InvalidArgumentError(f"label {name} must be a str, found {value!r}")
        self.content_type = CONTENT_TYPE_LATEST
        """What an HTTP response with `text()` says of itself."""
        self._snapshot = metrics
        self._prefix = prefix
        self._registry = CollectorRegistry() if registry is None else registry
        self._registry.register(self)

    def text(self) -> str:
        """The exposition of everything in the registry, for the answer to a scrape. From any thread."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: one family per metric, all from one snapshot."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        snapshot = self._snapshot()
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, about in GAUGES.items():
            gauge = GaugeMetricFamily(self._prefix + name, about, labels=names)
            gauge.add_metric(values, getattr(snapshot, name))
            yield gauge
        for name, about in COUNTERS.items():
            counter = CounterMetricFamily(self._prefix + name, about, labels=names)
            counter.add_metric(values, getattr(snapshot, name))
            yield counter
        about = "Samples of requests that ended, by reason."
        ended = CounterMetricFamily(self._prefix + "request_success", about, labels=(*names, FINISHED_REASON))
        for reason, count in snapshot.request_success.items():
            ended.add_metric((*values, reason), count)
        yield ended
        for name in HISTOGRAMS:
            yield self._histogram(name, snapshot)

    def _histogram(self, name: str, snapshot: MetricsSnapshot) -> HistogramMetricFamily:
        from prometheus_client.metrics_core import HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        histogram = getattr(snapshot, name)
        # The bounds are written as prometheus_client's own histograms write them: dashboards compare them as text.
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family = HistogramMetricFamily(self._prefix + name, HISTOGRAMS[name], labels=tuple(self._labels))
        family.add_metric(
            tuple(self._labels.values()), list(zip(bounds, histogram.cumulative, strict=True)), histogram.total
        )
        return family


def _need_prometheus_client() -> None:
    """Only the exposition needs it: metrics are counted and read without."""
    try:
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise ModuleNotFoundError(
            "the Prometheus exporter needs prometheus_client: in a checkout of pagedkv, pip install '.[engine]'",
            name="prometheus_client",
        ) from None
