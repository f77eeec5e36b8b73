"""What does a step of steady decoding cost, schedule and update, as the number of running requests grows?

Prompts of 512 real tokens, prefix cache on, one sampled token per request and step, an instantaneous model. A second row
adds the packed arrays that a model needs (token ids, slots, query offsets). Peer: vLLM 0.33's scheduler with a fake
model, on a machine whose yardstick was 9.4 ms (docs/peers.md).
"""

from __future__ import annotations

import time

import numpy as np
from harness import Report, repeat

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

PROMPT, NUM_STEPS, MAX_NEW = 512, 256, 1024
PEER_US = {64: 802, 256: 4496, 1024: 20700}
TARGET_US = {64: 100, 256: 160, 1024: 400}


def measure(num_running: int, *, packs: bool) -> float:
    """Microseconds of CPU per step, over steps in which blocks fill and are taken as requests reach them."""
    rng = np.random.default_rng(0)
    manager = KVCacheManager(CacheConfig(num_blocks=num_running * (PROMPT + MAX_NEW) // 16 + 64))
    budget = max(8192, num_running)
    scheduler = Scheduler(SchedulerConfig(budget, num_running), manager)
    for i in range(num_running):
        # Lengths differ by up to a block, so that boundaries do not fall into the same step for all.
        prompt = rng.integers(0, 32_000, PROMPT + i % 16).astype(np.int32)
        scheduler.add(Request(str(i), prompt, MAX_NEW), 0.0)
    tokens = rng.integers(0, 32_000, num_running).astype(np.int32)
    while True:
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, tokens[: len(plan.sampling_rows)], 0.0)
        if len(plan.rows) == num_running and plan.num_tokens.max() == 1:
            break
    start = time.thread_time()
    for _ in range(NUM_STEPS):
        plan = scheduler.schedule(0.0)
        if packs:
            _ = plan.token_ids, plan.slot_mapping, plan.query_start_loc, plan.seq_lens
        scheduler.update(plan, tokens, 0.0)
    return (time.thread_time() - start) / NUM_STEPS * 1e6


def main() -> None:
    report = Report(__doc__ or "")
    for num_running in (64, 256, 1024, 4096):
        peer = {"peer_vllm_us": PEER_US[num_running]} if num_running in PEER_US else {}
        target = {"target_us": TARGET_US[num_running]} if num_running in TARGET_US else {}
        report.add(
            f"{num_running} running", repeat(lambda n=num_running: measure(n, packs=False)), "us/step", **peer, **target
        )
        report.add(
            f"{num_running} running, packed arrays", repeat(lambda n=num_running: measure(n, packs=True)), "us/step"
        )
    report.write()


if __name__ == "__main__":
    main()
