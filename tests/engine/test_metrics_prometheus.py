"""The exposition is what Prometheus parses, and what vLLM's dashboards look for."""

from __future__ import annotations

import sys

import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager
from pagedkv.engine.metrics import EngineMetrics, PrometheusExporter
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")

TTFT_BOUNDS = [
    *("0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5"),
    *("5.0", "7.5", "10.0", "20.0", "40.0", "80.0", "160.0", "640.0", "2560.0", "+Inf"),
]


@pytest.fixture
def metrics():
    """Two requests of 4 prompt tokens: one has finished with 2 tokens at 0.5 and 1.0 s, the other one waits."""
    metrics = EngineMetrics(max_model_len=20)
    scheduler = Scheduler(SchedulerConfig(8, 1), KVCacheManager(CacheConfig(8, 2)), sink=metrics)
    metrics.watch(scheduler)
    scheduler.add(Request("a", [1, 2, 3, 4], 2), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 5], 2), 0.0)
    for start in (0.0, 0.5):
        plan = scheduler.schedule(start)
        metrics.on_step(plan, scheduler.update(plan, [9], start + 0.5), start, start + 0.5)
    return metrics


def families(text):
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def test_names_and_types_are_those_of_vllm(metrics):
    exposed = families(PrometheusExporter(metrics.snapshot, prefix="vllm:").text())

    assert {name: family.type for name, family in exposed.items()} == {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:prefix_cache_queries": "counter",
        "vllm:prefix_cache_hits": "counter",
        "vllm:num_preemptions": "counter",
        "vllm:prompt_tokens": "counter",
        "vllm:generation_tokens": "counter",
        "vllm:spec_decode_num_drafts": "counter",
        "vllm:spec_decode_num_draft_tokens": "counter",
        "vllm:spec_decode_num_accepted_tokens": "counter",
        "vllm:num_requests_refused": "counter",
        "vllm:num_failed_steps": "counter",
        "vllm:num_drafter_errors": "counter",
        "vllm:request_success": "counter",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:request_queue_time_seconds": "histogram",
        "vllm:request_prefill_time_seconds": "histogram",
        "vllm:request_decode_time_seconds": "histogram",
        "vllm:iteration_tokens_total": "histogram",
        "vllm:request_prompt_tokens": "histogram",
        "vllm:request_generation_tokens": "histogram",
        "vllm:step_time_seconds": "histogram",
    }


def test_samples_have_the_values_of_the_snapshot(metrics):
    text = PrometheusExporter(metrics.snapshot, labels={"model_name": "m/7B", "engine": "0"}).text()
    samples = {
        (sample.name, sample.labels.get("le"), sample.labels.get("finished_reason")): sample.value
        for family in families(text).values()
        for sample in family.samples
    }

    assert samples["pagedkv:num_requests_waiting", None, None] == 1
    assert samples["pagedkv:num_requests_running", None, None] == 0
    assert samples["pagedkv:generation_tokens_total", None, None] == 2
    assert samples["pagedkv:request_success_total", None, "length"] == 1
    assert samples["pagedkv:request_success_total", None, "stop"] == 0
    assert samples["pagedkv:request_success_total", None, "abort"] == 0
    assert samples["pagedkv:time_to_first_token_seconds_count", None, None] == 1
    assert samples["pagedkv:time_to_first_token_seconds_sum", None, None] == 0.5
    assert samples["pagedkv:time_to_first_token_seconds_bucket", "0.25", None] == 0
    assert samples["pagedkv:time_to_first_token_seconds_bucket", "0.5", None] == 1
    assert samples["pagedkv:time_to_first_token_seconds_bucket", "+Inf", None] == 1
    assert samples["pagedkv:iteration_tokens_total_bucket", "1.0", None] == 1
    assert samples["pagedkv:iteration_tokens_total_bucket", "8.0", None] == 2
    assert samples["pagedkv:iteration_tokens_total_sum", None, None] == 5


def test_every_sample_has_the_labels(metrics):
    labels = {"model_name": 'say "7B"\n', "engine": "0"}
    exposed = families(PrometheusExporter(metrics.snapshot, labels=labels).text())

    for family in exposed.values():
        for sample in family.samples:
            assert {name: sample.labels[name] for name in labels} == labels
            assert set(sample.labels) - set(labels) <= {"le", "finished_reason"}


def test_bounds_are_those_of_vllm_as_it_writes_them(metrics):
    exposed = families(PrometheusExporter(metrics.snapshot).text())

    def bounds(name):
        return [sample.labels["le"] for sample in exposed[name].samples if sample.name.endswith("_bucket")]

    assert bounds("pagedkv:time_to_first_token_seconds") == TTFT_BOUNDS
    assert bounds("pagedkv:request_prompt_tokens") == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]
    assert bounds("pagedkv:iteration_tokens_total")[-3:] == ["8192.0", "16384.0", "+Inf"]


def test_the_text_is_what_a_histogram_of_prometheus_client_writes(metrics):
    registry = prometheus_client.CollectorRegistry()
    about = "Tokens computed in a step."
    theirs = prometheus_client.Histogram(
        "vllm:iteration_tokens_total",
        about,
        labelnames=["model_name"],
        buckets=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
        registry=registry,
    )
    for value in (4, 1):
        theirs.labels(model_name="m").observe(value)

    ours = PrometheusExporter(metrics.snapshot, prefix="vllm:", labels={"model_name": "m"}).text()

    expected = prometheus_client.generate_latest(registry).decode().splitlines()
    expected = [line for line in expected if "_created" not in line]
    assert [line for line in ours.splitlines() if "iteration_tokens" in line] == expected


def test_an_application_may_expose_it_with_its_own_registry(metrics):
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    prometheus_client.Counter("tea", "Cups.", registry=registry).inc()

    PrometheusExporter(metrics.snapshot, registry=registry)

    text = prometheus_client.generate_latest(registry).decode()
    assert {"tea", "pagedkv:prompt_tokens"} <= set(families(text))
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusExporter(metrics.snapshot, registry=registry)


def test_each_scrape_is_of_its_moment(metrics):
    exporter = PrometheusExporter(metrics.snapshot)
    before = exporter.text()
    metrics.emit(type("Event", (), {}))  # An event of no kind that it knows changes nothing.
    unchanged = exporter.text()
    scheduler = metrics._scheduler
    plan = scheduler.schedule(1.0)
    metrics.on_step(plan, scheduler.update(plan, [9], 1.5), 1.0, 1.5)

    assert before == unchanged
    assert "pagedkv:generation_tokens_total 3.0" in exporter.text()


def test_the_content_type_is_the_one_of_the_text_format(metrics):
    assert PrometheusExporter(metrics.snapshot).content_type.startswith("text/plain; version=")


@pytest.mark.parametrize("prefix", ["", "7b:", "my-model:"])
def test_a_prefix_that_begins_no_name_is_refused(metrics, prefix):
    with pytest.raises(InvalidArgumentError, match="prefix"):
        PrometheusExporter(metrics.snapshot, prefix=prefix)


@pytest.mark.parametrize("labels", [{"le": "1"}, {"finished_reason": "x"}, {"model-name": "m"}, {"__name": "m"}])
def test_a_label_that_cannot_be_one_is_refused(metrics, labels):
    with pytest.raises(InvalidArgumentError, match="cannot be a label"):
        PrometheusExporter(metrics.snapshot, labels=labels)


def test_a_label_is_text(metrics):
    with pytest.raises(InvalidArgumentError, match="label engine must be a str, found 0"):
        PrometheusExporter(metrics.snapshot, labels={"engine": 0})


def test_without_prometheus_client_the_extra_is_named(metrics, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[engine\]'"):
        PrometheusExporter(metrics.snapshot)
