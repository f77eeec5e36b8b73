"""Leaps change nothing, nothing is lost, and figures come from timestamps."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import ConfigError, InvalidArgumentError
from pagedkv.scheduler import EventLog
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.replay import ReplayConfig, replay
from pagedkv.simulations.run import Run
from pagedkv.simulations.traces import Trace

WALL_CLOCK = ("wall_s", "requests_per_wall_s")


def outcome(trace: Trace, **config: Any) -> tuple[dict[str, Any], str, Run]:
    log = io.StringIO()
    run = replay(trace, ReplayConfig(**config), sink=EventLog(log))
    summary = {key: value for key, value in summarize(run).items() if key not in WALL_CLOCK}
    return summary, log.getvalue(), run


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Small traces: bursts, ties, a first arrival at 0, shared prefixes of 4-token blocks, prefill-only requests."""
    num_requests = draw(st.integers(1, 12))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.004, 0.02, 0.3]), min_size=num_requests, max_size=num_requests))
    prompts = draw(st.lists(st.integers(1, 24), min_size=num_requests, max_size=num_requests))
    outputs = draw(st.lists(st.integers(0, 20), min_size=num_requests, max_size=num_requests))
    runs = None
    if draw(st.booleans()):
        runs = []
        for i, num_tokens in enumerate(prompts):
            num_blocks = num_tokens // 4
            num_shared = draw(st.integers(0, num_blocks))
            family = 1000 * draw(st.integers(0, 1))
            own = 10_000 + 100 * i
            runs.append([(family, num_shared), (own, num_blocks - num_shared)])
        runs = [[run for run in request if run[1]] for request in runs]
    return Trace.from_columns(
        np.cumsum(gaps), prompts, outputs, content_block_size=4 if runs else None, content_runs=runs
    )


configurations = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([2, 4]),
        "num_blocks": st.integers(24, 60),
        "num_host_blocks": st.sampled_from([1, 10, 60]),
        "preemption": st.sampled_from(["recompute", "swap", "cheaper"]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "eviction": st.sampled_from(["lru", "fifo", "s3-fifo", "sieve"]),
        "prefix_caching": st.booleans(),
        "max_num_batched_tokens": st.sampled_from([8, 16, 64]),
        "max_num_running": st.sampled_from([2, 8]),
        "long_prefill_tokens": st.sampled_from([None, 5]),
        "admission_interval": st.sampled_from([1, 1, 3, 20]),
        "watermark": st.sampled_from([0.0, 0.1]),
        "max_bypasses": st.sampled_from([0, 2]),
    }
)


@given(traces(), configurations)
@settings(max_examples=250, deadline=None)
def test_leaping_and_stepping_give_the_same_events_and_figures(trace: Trace, config: dict[str, Any]) -> None:
    leapt, leapt_log, run = outcome(trace, **config)
    stepped, stepped_log, _ = outcome(trace, **config, leaps=False, checks=True)

    assert leapt_log == stepped_log
    assert leapt == stepped
    assert leapt["num_finished"] + leapt["num_rejected"] == len(trace)
    assert leapt["num_rejected"] == 0
    assert leapt["output_tokens"] == int(trace.output_tokens.sum())
    assert not np.isnan(run.requests.finished_s).any()


def test_leaps_are_taken() -> None:
    trace = Trace.from_columns([0.0], [10], [1000])
    plans = []

    run = replay(trace, ReplayConfig(num_blocks=100), sink=None)
    from pagedkv.scheduler import Scheduler

    original = Scheduler.schedule
    try:
        Scheduler.schedule = lambda self, now: plans.append(now) or original(self, now)
        replay(trace, ReplayConfig(num_blocks=100))
    finally:
        Scheduler.schedule = original

    assert len(run.steps) == 1000
    assert len(plans) == 1


def test_first_arrival_at_zero_and_equal_timestamps_keep_the_order_of_the_file() -> None:
    trace = Trace.from_columns([0.0, 0.0, 0.0], [10, 10, 10], [1, 1, 1])

    _, log, _ = outcome(trace, max_num_running=1, num_blocks=100)

    admitted = [line for line in log.splitlines() if '"admitted"' in line]
    assert [f'"request_id":"{i}"' in line for i, line in enumerate(admitted)] == [True, True, True]


def test_the_policy_sees_the_priorities_of_the_trace() -> None:
    trace = Trace.from_columns([0.0] * 3, [8, 8, 8], [4, 4, 4], priorities=[2, 0, 1])

    run = replay(trace, ReplayConfig(policy="priority", max_num_running=1, num_blocks=8))

    assert run.requests.finished_s.argsort().tolist() == [1, 2, 0]


def test_limits_of_prompts_and_clients_reach_the_scheduler() -> None:
    trace = Trace.from_columns([0.0] * 3, [40, 8, 8], [4, 4, 4], clients=[0, 1, 1])
    config = ReplayConfig(num_blocks=64, max_num_batched_tokens=32, max_num_running=4, client_share=0.25)

    run = replay(trace, config)
    whole = replay(trace, dataclasses.replace(config, chunked_prefill=False, client_share=None, max_preemptions=3))

    # One seat each: the second client's second request waits for its first.
    assert run.requests.admitted_s[2] >= run.requests.finished_s[1]
    assert (whole.requests.admitted_s[1:] == 0).all()
    assert "must be computed in one step without chunked prefill" in whole.rejections[0]
    assert whole.configuration["max_preemptions"] == 3


def test_a_request_that_can_never_fit_is_counted_with_its_reason() -> None:
    trace = Trace.from_columns([0.0, 0.1], [100, 10], [5, 5])

    summary, _, run = outcome(trace, num_blocks=4, block_size=16)

    assert (summary["num_rejected"], summary["num_finished"]) == (1, 1)
    assert run.rejections[0].endswith("100 prompt + 5 new tokens need 7 blocks of 16, the pool has 4")


def test_hit_tokens_of_shared_prefixes_are_counted() -> None:
    trace = Trace.from_columns([0.0, 5.0], [8, 10], [2, 2], content_block_size=4, content_runs=[[(0, 2)], [(0, 2)]])

    summary, _, run = outcome(trace, num_blocks=100)

    assert run.requests.num_hit.tolist() == [0, 8]
    assert summary["prefix_hit_ratio"] == 8 / 18


def test_latencies_of_a_lone_request_are_sums_of_step_times() -> None:
    trace = Trace.from_columns([1.0], [16], [3])

    summary, _, run = outcome(trace, num_blocks=100)

    durations = run.steps.column("duration_s")
    assert len(durations) == 3
    assert summary["queue_s"]["max"] == 0.0
    assert summary["ttft_s"]["max"] == pytest.approx(durations[0], abs=1e-12)
    assert summary["e2e_s"]["max"] == pytest.approx(durations.sum(), abs=1e-12)
    assert summary["tpot_s"]["max"] == pytest.approx(durations[1:].mean(), abs=1e-12)
    assert summary["itl_s"]["max"] == pytest.approx(durations[1:].max(), abs=1e-12)
    assert summary["makespan_s"] == pytest.approx(durations.sum(), abs=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "GPT-9"},
        {"device": "abacus"},
        {"policy": "lifo"},
        {"preemption": "kill"},
        {"eviction": "random"},
        {"num_blocks": 0},
        {"block_size": -1},
        {"rate_scale": 0.0},
        {"rate_scale": float("nan")},
        {"num_devices": 0},
        {"watermark": 2.0},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_one_typed_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        replay(Trace.from_columns([0.0], [4], [1]), ReplayConfig(**wrong))

    assert "\n" not in str(caught.value)
    assert type(caught.value).__module__.startswith("pagedkv")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "Llama3"}, "Llama3"),
        ({"device": "H1000"}, "H1000"),
        ({"policy": "x"}, "policy must be one of fcfs, priority, found 'x'"),
        ({"preemption": "x"}, "preemption must be one of recompute, swap, cheaper, found 'x'"),
        ({"eviction": "x"}, "eviction policy must be one of lru, .* found 'x'"),
    ],
    ids=str,
)
def test_a_name_that_nothing_has_is_refused_before_a_trace_is_there(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InvalidArgumentError), match=message):
        ReplayConfig(**wrong)


def test_the_path_of_a_trace_is_no_trace() -> None:
    with pytest.raises(InvalidArgumentError, match=r"found a str: load_trace\(path\) reads one"):
        replay("trace.csv")


def test_a_block_size_that_cuts_through_named_blocks_is_refused() -> None:
    trace = Trace.from_columns([0.0], [8], [1], content_block_size=4, content_runs=[[(0, 2)]])

    with pytest.raises(ConfigError, match="choose a divisor or a multiple of 4"):
        replay(trace, ReplayConfig(block_size=3))


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_named_blocks_are_shared_at_every_fitting_block_size(block_size: int) -> None:
    trace = Trace.from_columns([0.0, 5.0], [17, 17], [1, 1], content_block_size=4, content_runs=[[(0, 4)], [(0, 4)]])

    _, _, run = outcome(trace, num_blocks=200, block_size=block_size)

    assert run.requests.num_hit.tolist() == [0, 16]
