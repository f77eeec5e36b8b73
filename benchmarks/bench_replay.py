"""How much CPU does a replay take, and how does that grow with the number of requests?

Whole processes of `pagedkv replay` (start-up, loading, simulation, all reports), user + system time; and the simulation
phase alone for the Mooncake trace. Peers for 10,000 Azure conversation requests: Vidur 19.7 s, splitwise-sim 15.1 s of CPU;
for the Mooncake conversation trace on 16,384 blocks of 512: Dynamo's replay 6.5 s for its simulation phase (docs/peers.md).
Reads the public traces of docs/traces.md; says so and stops where they are absent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from harness import Report, repeat
from public_traces import AZURE_CONVERSATION as CONVERSATION
from public_traces import MOONCAKE_CONVERSATION as MOONCAKE
from public_traces import missing

from pagedkv.simulations.replay import ReplayConfig, replay
from pagedkv.simulations.traces import load_trace


def process_cpu(*arguments: str) -> float:
    """CPU seconds of one run of the command, children included."""
    with tempfile.TemporaryDirectory() as out:
        before = os.times()
        command = [sys.executable, "-m", "pagedkv", "replay", *arguments, "--out", out]
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def simulation_cpu(config: ReplayConfig) -> float:
    """CPU seconds of the simulation phase alone."""
    trace = load_trace(MOONCAKE)
    start = time.process_time()
    replay(trace, config)
    return time.process_time() - start


def main() -> None:
    if missing(CONVERSATION, MOONCAKE):
        return
    report = Report(__doc__ or "")
    report.add("start-up: one request", repeat(lambda: process_cpu(str(CONVERSATION), "--limit", "1")), "s CPU")
    for num_requests in (1_000, 10_000):
        peers = {"peer_vidur_s": 19.7, "peer_splitwise_sim_s": 15.1, "target_s": 2.5} if num_requests == 10_000 else {}
        figures = repeat(lambda n=num_requests: process_cpu(str(CONVERSATION), "--limit", str(n)))
        report.add(f"azure conversation, {num_requests} requests", figures, "s CPU", **peers)
    figures = repeat(lambda: process_cpu(str(CONVERSATION)))
    report.add("azure conversation, all 19366 requests", figures, "s CPU")
    figures = repeat(lambda: process_cpu(str(CONVERSATION), "--limit", "10000", "--no-leaps"), 1)
    report.add("azure conversation, 10000 requests, every step taken", figures, "s CPU")
    figures = repeat(lambda: simulation_cpu(ReplayConfig(num_blocks=16_384)))
    report.add("mooncake, simulation phase", figures, "s CPU", peer_dynamo_s=6.5, target_s=3)
    report.write()


if __name__ == "__main__":
    main()
