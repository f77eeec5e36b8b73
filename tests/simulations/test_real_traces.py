"""Replays of the shared traces: nothing is lost, nothing leaks, and two runs give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pagedkv.scheduler import Scheduler
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.replay import ReplayConfig, replay
from pagedkv.simulations.traces import load_trace

CONVERSATION, CODE = "azure_llm_2023_conv.csv.gz", "azure_llm_2023_code.csv.gz"
MOONCAKE, CLIENTS = "mooncake_fast25_conversation.jsonl.gz", "vtc_arena_clients.csv.gz"
AGENTIC = "agentic_coding_sessions.jsonl.gz"
WALL_CLOCK = ("wall_s", "requests_per_wall_s")

# Trace, requests to replay (None: all), configuration, and how many requests can never fit.
REPLAYS = [
    pytest.param(CONVERSATION, 5000, {}, id="conversation-head"),
    pytest.param(CONVERSATION, None, {}, id="conversation", marks=pytest.mark.slow),
    pytest.param(CODE, 3000, {"num_blocks": 4000}, id="code-bursts-on-a-small-pool-head"),
    pytest.param(CODE, None, {"num_blocks": 4000}, id="code-bursts-on-a-small-pool", marks=pytest.mark.slow),
    pytest.param(CONVERSATION, 3000, {"num_blocks": 1500}, id="conversation-recompute"),
    pytest.param(CONVERSATION, 3000, {"num_blocks": 1500, "preemption": "swap"}, id="conversation-swap"),
    pytest.param(MOONCAKE, 2000, {"num_blocks": 16_384}, id="mooncake-head"),
    pytest.param(MOONCAKE, None, {"num_blocks": 16_384}, id="mooncake", marks=pytest.mark.slow),
    pytest.param(CLIENTS, None, {"policy": "priority", "num_blocks": 300}, id="clients-priority"),
    pytest.param(AGENTIC, 1000, {"num_blocks": 20_000}, id="agentic-head"),
    pytest.param(AGENTIC, None, {"num_blocks": 20_000}, id="agentic", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "limit", "config"), REPLAYS)
def test_a_replay_ends_with_every_block_free_and_no_request_lost(
    shared_trace, monkeypatch: pytest.MonkeyPatch, name: str, limit: int | None, config: dict
) -> None:
    trace = load_trace(shared_trace(name))
    trace = trace if limit is None else trace.head(limit)
    schedulers: list[Scheduler] = []
    original = Scheduler.__init__

    def remember(self: Scheduler, *args: object, **policies: object) -> None:
        original(self, *args, **policies)
        schedulers.append(self)

    monkeypatch.setattr(Scheduler, "__init__", remember)

    run = replay(trace, ReplayConfig(checks=True, **config))

    (scheduler,) = schedulers
    pool = scheduler.manager.memory.pool
    scheduler.check_invariants()
    assert (pool.num_used, pool.num_available) == (0, pool.num_blocks)
    assert scheduler.manager.memory.host_pool.num_used == 0
    assert not scheduler.has_work
    summary = summarize(run)
    assert summary["num_finished"] + summary["num_rejected"] == len(trace) == summary["num_requests"]
    finished = ~run.requests.is_rejected
    assert (run.requests.num_output[finished] == trace.output_tokens[finished]).all()
    assert (run.requests.admitted_s[finished] >= trace.arrival_s[finished]).all()
    assert (run.requests.first_token_s[finished] >= run.requests.admitted_s[finished]).all()
    assert (run.requests.finished_s[finished] >= run.requests.first_token_s[finished]).all()
    num_hit = run.requests.num_hit[finished]
    assert (num_hit < trace.prompt_tokens[finished]).all()
    # What each request computed, beyond what it was given, is counted in the steps.
    if not summary["num_preemptions"]:
        expected = trace.prompt_tokens + np.maximum(trace.output_tokens - 1, 0) - run.requests.num_hit
        assert run.steps.column("num_tokens").sum() == expected[finished].sum()


def digest_of_replay(path: Path, out: Path, hash_seed: str) -> tuple[dict, str]:
    events = out / "events.jsonl"
    command = [sys.executable, "-m", "pagedkv", "replay", str(path), "--limit", "700", "--num-blocks", "900"]
    command += ["--block-size", "16", "--out", str(out), "--events", str(events), "--preemption", "cheaper"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run(command, check=True, env=env, capture_output=True)
    summary = json.loads((out / "summary.json").read_text())
    return summary, hashlib.sha256(events.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [CONVERSATION, CLIENTS])
def test_two_runs_give_the_same_bytes_whatever_the_hash_seed(shared_trace, tmp_path: Path, name: str) -> None:
    runs = []
    for hash_seed in ("0", "0", "1"):
        out = tmp_path / f"{len(runs)}"
        out.mkdir()
        summary, events = digest_of_replay(shared_trace(name), out, hash_seed)
        kept = {key: value for key, value in summary.items() if key not in WALL_CLOCK}
        runs.append((kept, events, (out / "requests.csv").read_bytes()))

    assert runs[0] == runs[1] == runs[2]


def test_the_small_pool_really_preempts(shared_trace) -> None:
    trace = load_trace(shared_trace(CONVERSATION)).head(3000)

    summary = summarize(replay(trace, ReplayConfig(num_blocks=1500, preemption="swap")))

    assert summary["num_preemptions"] >= summary["num_swaps"] > 0
