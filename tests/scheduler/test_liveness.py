"""Under overload everybody gets through, and nobody is thrown out again and again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import LowestPriority, Priority, Recompute, Request, Scheduler, SchedulerConfig, Swap


def overload(seed: int, *, num_requests: int, num_blocks: int, watermark: float, **policies):
    """Run a burst of requests on a pool that holds a few of them; returns the steps and preemptions of each request."""
    rng = np.random.default_rng(seed)
    manager = KVCacheManager(CacheConfig(num_blocks, 4, num_blocks if rng.random() < 0.5 else 0))
    scheduler = Scheduler(SchedulerConfig(64, 16, watermark=watermark), manager, **policies)
    num_tokens = 0
    for i in range(num_requests):
        prompt, new = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        num_tokens += prompt + new
        scheduler.add(Request(f"r{i}", SimulatedPrompt(prompt), new, priority=float(rng.integers(3))), float(i))
    preemptions: dict[str, int] = {}
    for num_steps in range(200 * num_requests):
        if not scheduler.has_work:
            return num_steps, preemptions, num_tokens
        plan = scheduler.schedule(float(num_requests))
        assert len(plan.rows), "work is there and nothing runs"
        for sample, _ in scheduler.update(plan, None, float(num_requests)).finished:
            preemptions[sample.request.request_id] = sample.num_preemptions
    raise AssertionError("not everybody got through")


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([Recompute(), Swap()]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_request_of_an_overload_finishes(seed, watermark, preemption, by_priority) -> None:
    order = {"policy": Priority(), "victim": LowestPriority()} if by_priority else {}

    num_steps, preemptions, _ = overload(
        seed, num_requests=30, num_blocks=24, watermark=watermark, preemption=preemption, **order
    )

    assert len(preemptions) == 30
    assert max(preemptions.values()) <= 8
    assert num_steps < 30 * 80


@pytest.mark.parametrize("seed", range(3))
def test_a_watermark_makes_preemptions_rarer(seed) -> None:
    _, without, _ = overload(seed, num_requests=60, num_blocks=60, watermark=0.0)
    _, with_one, _ = overload(seed, num_requests=60, num_blocks=60, watermark=0.1)

    assert sum(with_one.values()) < sum(without.values())


def test_a_request_is_passed_at_most_as_often_as_the_bound_says_while_small_ones_keep_coming() -> None:
    scheduler = Scheduler(SchedulerConfig(64, 16, watermark=0, max_bypasses=3), KVCacheManager(CacheConfig(16, 4)))
    scheduler.add(Request("first", SimulatedPrompt(30), 20), 0.0)
    order = []
    for i in range(80):
        if i == 2:
            scheduler.add(Request("large", SimulatedPrompt(40), 2), float(i))
        if i > 2:
            scheduler.add(Request(f"small{i}", SimulatedPrompt(2), 1), float(i))
        plan = scheduler.schedule(float(i))
        order += [seat.request_id for seat in plan.admitted]
        scheduler.update(plan, None, float(i))

    assert order.index("large") == 1 + 3
