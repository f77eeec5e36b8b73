"""What does `check="cheap"` cost in production, against `check="off"`? Promised: at most 5 %.

Steps of steady decoding with 16, 64 and 256 running requests (schedule and update; prompts of 512 real tokens, prefix cache
on), and the manager's own verbs (open, append, extend, close of sequences of 64 tokens). Off and cheap are measured in
many short turns, each of them first in every other one, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from harness import Report, spread

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

PROMPT, NUM_STEPS, NUM_TURNS = 512, 60, 120


def steady_scheduler(num_running: int, check: str) -> tuple[Scheduler, np.ndarray]:
    rng = np.random.default_rng(0)
    max_new = NUM_STEPS * (NUM_TURNS + 1) + 60
    manager = KVCacheManager(CacheConfig(num_blocks=num_running * (PROMPT + max_new) // 16 + 64), check=check)
    scheduler = Scheduler(SchedulerConfig(max(8192, num_running), num_running), manager)
    for i in range(num_running):
        scheduler.add(Request(str(i), rng.integers(0, 32_000, PROMPT + i % 16).astype(np.int32), max_new), 0.0)
    tokens = rng.integers(0, 32_000, num_running).astype(np.int32)
    for _ in range(60):
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, tokens[: len(plan.sampling_rows)], 0.0)
    return scheduler, tokens


def time_steps(scheduler: Scheduler, tokens: np.ndarray) -> float:
    """Microseconds of CPU per step."""
    start = time.thread_time()
    for _ in range(NUM_STEPS):
        scheduler.update(scheduler.schedule(0.0), tokens, 0.0)
    return (time.thread_time() - start) / NUM_STEPS * 1e6


def time_verbs(manager: KVCacheManager) -> float:
    """Microseconds of CPU per call, over sequences that are opened, grown by 32 tokens, and closed."""
    prompts = [list(range(i, i + 64)) for i in range(8)]
    num_calls = 0
    start = time.thread_time()
    for i, prompt in enumerate(prompts):
        manager.append(i, 64 - manager.open(i, prompt))
        for _ in range(32):
            manager.extend(i, [7])
            manager.append(i, 1)
        num_calls += 2 + 64
    for i in range(len(prompts)):
        manager.close(i)
    return (time.thread_time() - start) / (num_calls + len(prompts)) * 1e6


def compare(report: Report, name: str, run: dict[str, Callable[[], float]]) -> None:
    """Measure off and cheap in turns; report both, and the median of the ratios of neighbours."""
    times: dict[str, list[float]] = {check: [] for check in run}
    gc.disable()
    for turn in range(NUM_TURNS):
        for check in sorted(run, reverse=turn % 2 == 1):
            times[check].append(run[check]())
    gc.enable()
    ratio = median(cheap / off for off, cheap in zip(times["off"], times["cheap"], strict=True))
    report.add(f"{name}, off", spread(times["off"]), "us")
    report.add(f"{name}, cheap", spread(times["cheap"]), "us", overhead=round(ratio - 1, 4), target=0.05)


def main() -> None:
    report = Report(__doc__ or "")
    for num_running in (16, 64, 256):
        services = {check: steady_scheduler(num_running, check) for check in ("off", "cheap")}
        runs = {check: (lambda s=service: time_steps(*s)) for check, service in services.items()}
        compare(report, f"step of {num_running} rows", runs)
    managers = {check: KVCacheManager(CacheConfig(num_blocks=4096), check=check) for check in ("off", "cheap")}
    compare(report, "call of the manager", {c: (lambda m=manager: time_verbs(m)) for c, manager in managers.items()})
    report.write()


if __name__ == "__main__":
    main()
