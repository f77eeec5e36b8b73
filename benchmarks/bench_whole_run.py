"""How many requests per second of CPU go through scheduler and manager, every step taken?

Requests of 512 + 128 real tokens, all queued at once, budget 8,192, 256 seats, 10,497 blocks of 16, prefix cache on and
never hit. Peer: vLLM 0.33's core with a fake model does 362 requests/s at a yardstick of 9.4 ms (docs/peers.md).
"""

from __future__ import annotations

import numpy as np
from harness import Report, repeat, spread, time_once

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

PROMPT, OUTPUT = 512, 128


def run(num_requests: int, num_blocks: int) -> float:
    """Requests per second of CPU."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 32_000, (num_requests, PROMPT), dtype=np.int32)
    tokens = rng.integers(0, 32_000, 256).astype(np.int32)
    manager = KVCacheManager(CacheConfig(num_blocks))
    scheduler = Scheduler(SchedulerConfig(8192, 256), manager)

    def serve() -> None:
        for i in range(num_requests):
            scheduler.add(Request(str(i), prompts[i], OUTPUT), 0.0)
        while scheduler.has_work:
            plan = scheduler.schedule(0.0)
            scheduler.update(plan, tokens[: len(plan.sampling_rows)], 0.0)

    return num_requests / time_once(serve)


def main() -> None:
    report = Report(__doc__ or "")
    for num_requests in (1_000, 10_000, 100_000, 1_000_000):
        peer = {"peer_vllm": 362, "target": 7500} if num_requests == 10_000 else {}
        is_long = num_requests > 10_000
        figures = spread([run(num_requests, 10_497)]) if is_long else repeat(lambda n=num_requests: run(n, 10_497))
        report.add(f"{num_requests} requests", figures, "requests/s", **peer)
    report.add("2500 requests, 7000 blocks (preempting)", repeat(lambda: run(2500, 7000)), "requests/s", peer_vllm=345)
    report.write()


if __name__ == "__main__":
    main()
