"""What does aborting one of many waiting requests cost?

Peer: vLLM 0.33 with 10,000 waiting needs 281 us (FCFS) and 6,900 us (priority) at a yardstick of 9.4 ms (docs/peers.md).
"""

from __future__ import annotations

import time

import numpy as np
from harness import Report, repeat

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import FCFS, Priority, Request, Scheduler, SchedulerConfig

NUM_ABORTS = 100


def measure(policy: FCFS | Priority, num_waiting: int) -> float:
    """Microseconds of CPU per abort of a random waiting request."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(1000)), policy=policy)
    prompt = np.arange(64, dtype=np.int32)
    for i in range(num_waiting):
        scheduler.add(Request(str(i), prompt, 16, priority=float(i * 7919 % 4)), float(i))
    victims = rng.permutation(num_waiting)[:NUM_ABORTS].tolist()
    start = time.thread_time()
    for victim in victims:
        scheduler.abort(str(victim), 0.0)
    return (time.thread_time() - start) / NUM_ABORTS * 1e6


def main() -> None:
    report = Report(__doc__ or "")
    peers = {("FCFS", 1_000): 35, ("FCFS", 10_000): 281, ("Priority", 1_000): 185, ("Priority", 10_000): 6900}
    for policy in (FCFS(), Priority()):
        name = type(policy).__name__
        for num_waiting in (1_000, 10_000, 100_000):
            peer = {"peer_vllm_us": peers[name, num_waiting]} if (name, num_waiting) in peers else {}
            target = {"target_us": 20} if num_waiting == 10_000 else {}
            figures = repeat(lambda p=policy, n=num_waiting: measure(p, n))
            report.add(f"{name}, {num_waiting} waiting", figures, "us", **peer, **target)
    report.write()


if __name__ == "__main__":
    main()
