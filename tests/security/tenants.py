"""Two tenants on one scheduler: what the first one sees, as a text, whatever the other's tokens are."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.eviction import make_policy
from pagedkv.scheduler import EventLog, QueuePolicy, Request, Scheduler, SchedulerConfig, Swap

VOCABULARY = 1000

Arrival = tuple[int, str, list[int], int]
"""(step, id, prompt, new tokens); ids of the first tenant begin with "a", those of the second with "b"."""


def draw_traffic(rng: np.random.Generator) -> list[Arrival]:
    """Both tenants ask the same few prompts and parts of them, so that each would hit what the other has computed."""
    prompts = [rng.integers(0, VOCABULARY, int(rng.integers(4, 24))).tolist() for _ in range(3)]
    traffic = []
    for number in range(int(rng.integers(6, 14))):
        prompt = prompts[int(rng.integers(3))]
        stop = int(rng.integers(2, len(prompt) + 1))
        tail = rng.integers(0, VOCABULARY, int(rng.integers(0, 4))).tolist()
        traffic.append(
            (int(rng.integers(0, 8)), f"{'ab'[number % 2]}{number}", prompt[:stop] + tail, int(rng.integers(1, 8)))
        )
    return sorted(traffic, key=lambda arrival: arrival[0])


def with_other_tokens_of_b(traffic: list[Arrival], rng: np.random.Generator) -> list[Arrival]:
    """The same load: equal tokens of b stay equal, different ones different, but none is what it was."""
    renamed = (rng.permutation(VOCABULARY) + VOCABULARY).tolist()
    return [
        (step, name, [renamed[token] for token in prompt] if name[0] == "b" else prompt, num_new)
        for step, name, prompt, num_new in traffic
    ]


def make_scheduler(
    log: io.StringIO, *, eviction: str = "lru", policy: Callable[[KVCacheManager], QueuePolicy] | None = None
) -> Scheduler:
    """A pool so small that requests wait, are preempted and swapped, and cached blocks are evicted."""
    manager = KVCacheManager(CacheConfig(14, 4, 8), eviction=make_policy(eviction, 14))
    config = SchedulerConfig(24, 4, watermark=0, max_bypasses=2)
    made = None if policy is None else policy(manager)
    return Scheduler(config, manager, policy=made, preemption=Swap(), sink=EventLog(log))


def run(
    traffic: list[Arrival],
    salts: dict[str, bytes],
    *,
    eviction: str = "lru",
    policy: Callable[[KVCacheManager], QueuePolicy] | None = None,
) -> str:
    """Serve the traffic and return everything that the first tenant can see: events, plans of its rows, block counts."""
    log = io.StringIO()
    scheduler = make_scheduler(log, eviction=eviction, policy=policy)
    seen: list[object] = []
    left = list(traffic)
    owners: dict[int, str] = {}
    for step in range(500):
        while left and left[0][0] <= step:
            _, name, prompt, num_new = left.pop(0)
            scheduler.add(Request(name, prompt, num_new, salt=salts[name[0]]), float(step))
        if not left and not scheduler.has_work:
            break
        plan = scheduler.schedule(float(step))
        owners |= {seat.row: seat.request_id for seat in plan.admitted}
        own = [i for i, row in enumerate(plan.rows.tolist()) if owners[row][0] == "a"]
        memory = scheduler.manager.memory
        seen.append([step, plan.rows[own].tolist(), plan.starts[own].tolist(), plan.num_tokens[own].tolist()])
        seen.append([memory.pool.num_used, memory.pool.num_evictable, len(plan.swaps_in), len(plan.swaps_out)])
        # Sampled tokens are those of no prompt, of neither run: else b would share more with itself in one of them.
        scheduler.update(plan, [2 * VOCABULARY + step % 7] * len(plan.sampling_rows), float(step) + 0.5)
        scheduler.check_invariants()
    else:
        raise AssertionError("still at work after 500 steps")
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    own_events = [event for event in events if event.get("request_id", "a")[0] == "a"]
    return "\n".join(map(json.dumps, [*own_events, *seen]))
