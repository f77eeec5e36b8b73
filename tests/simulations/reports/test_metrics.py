from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pagedkv.simulations.metrics import summarize, weighted_quantiles, weighted_statistics
from pagedkv.simulations.run import Run
from pagedkv.simulations.step_log import StepLog

NONE = {"mean": None, "p50": None, "p90": None, "p99": None, "max": None}


def same(value: float) -> dict[str, float]:
    return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), value)


def test_the_figures_of_three_requests_are_those_worked_out_by_hand(run: Run) -> None:
    summary = summarize(run)
    assert summary.pop("kv_utilization_mean") == pytest.approx(14 / 60)  # (2 + 2 + 2 * 5) / 6 s / 10 blocks
    assert summary.pop("request_throughput") == pytest.approx(2 / 6)
    assert summary.pop("prefix_hit_ratio") == pytest.approx(4 / 12)
    assert summary.pop("ttft_s") == pytest.approx({"mean": 1.75, "p50": 1.75, "p90": 2.35, "p99": 2.485, "max": 2.5})
    assert summary.pop("queue_s") == pytest.approx({"mean": 0.25, "p50": 0.25, "p90": 0.45, "p99": 0.495, "max": 0.5})
    assert summary.pop("e2e_s") == pytest.approx({"mean": 2.25, "p50": 2.25, "p90": 2.45, "p99": 2.495, "max": 2.5})
    assert summary == {
        "num_requests": 3,
        "num_finished": 2,
        "num_rejected": 1,
        "num_preemptions": 1,
        "num_swaps": 1,
        "makespan_s": 6.0,
        "output_token_throughput": 0.5,
        "prompt_tokens": 12,
        "output_tokens": 3,
        "prefix_hit_tokens": 4,
        "kv_utilization_max": 0.5,
        "num_steps": 3,
        "wall_s": 0.5,
        "requests_per_wall_s": 4.0,
        "tpot_s": same(1.0),
        "itl_s": same(1.0),
    }


def test_a_run_of_rejected_requests_has_no_latencies_and_no_rates(rejected_run: Run) -> None:
    summary = summarize(rejected_run)
    assert (summary["num_requests"], summary["num_finished"], summary["num_rejected"]) == (1, 0, 1)
    assert (summary["makespan_s"], summary["num_steps"], summary["kv_utilization_max"]) == (0.0, 0, 0.0)
    assert [summary[key] for key in ("request_throughput", "output_token_throughput", "prefix_hit_ratio")] == [None] * 3
    assert [summary[f"{name}_s"] for name in ("ttft", "tpot", "itl", "e2e", "queue")] == [NONE] * 5


def test_a_pool_that_is_always_full_is_used_to_one_and_no_more(run: Run) -> None:
    steps = StepLog()
    for start in (0.0, 0.3, 0.6):  # 0.3 three times is 0.9, while 0.6 + 0.3 is less.
        steps.append((start, 0.3, 1, 0, 1, 10))
    mean = summarize(dataclasses.replace(run, steps=steps))["kv_utilization_mean"]
    assert 1 - 1e-12 < mean <= 1


def test_a_request_without_output_has_an_end_but_no_first_token(run: Run) -> None:
    run.requests.num_output[:] = 0
    summary = summarize(run)
    assert (summary["ttft_s"], summary["tpot_s"]) == (NONE, NONE)
    assert (summary["e2e_s"]["max"], summary["output_tokens"]) == (2.5, 0)


def test_weights_stand_for_repeated_values() -> None:
    values, counts = np.array([1.0, 2.0, 10.0]), np.array([5, 3, 2])
    repeated = np.repeat(values, counts)
    levels = np.linspace(0, 1, 41)
    assert weighted_quantiles(values, counts, levels) == pytest.approx(np.quantile(repeated, levels))
    assert weighted_statistics(values, counts) == pytest.approx(
        {"mean": 3.1, "p50": 1.5, "p90": 10.0, "p99": 10.0, "max": 10.0}
    )


def test_one_value_is_every_percentile() -> None:
    assert weighted_statistics(np.array([3.0]), np.array([1])) == same(3.0)
    assert weighted_statistics(np.empty(0), np.empty(0, np.int64)) == NONE
