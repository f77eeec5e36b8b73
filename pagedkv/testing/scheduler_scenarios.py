"""What schedulers are put through: small services, each made so that one kind of decision is common."""

from __future__ import annotations

import numpy as np

from pagedkv.config import CacheConfig
from pagedkv.scheduler import Request, SchedulerConfig
from pagedkv.testing.scheduler_driver import Scenario
from pagedkv.testing.scheduler_shadow import VOCABULARY

__all__ = ["scheduler_scenarios"]

Arrivals = list[tuple[int, Request]]


def _requests(
    seed: int, num: int, *, prompt: tuple[int, int], new: tuple[int, int], every: int = 1, n: int = 1, shared: int = 0
) -> Arrivals:
    """`num` requests, one every `every` steps (0: all at once), with lengths in these half-open ranges."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCABULARY, shared).tolist()
    return [
        (
            i * every,
            Request(
                f"r{i}",
                common + rng.integers(0, VOCABULARY, int(rng.integers(*prompt))).tolist(),
                int(rng.integers(*new)),
                n=n if i % 3 == 0 else 1,
                stop_token_ids=rng.integers(0, VOCABULARY, 2).tolist() if i % 5 == 4 else (),
            ),
        )
        for i in range(num)
    ]


def _edges() -> Arrivals:
    """What just fits into 8 blocks of 4, and what just does not; prompts that want no token; more samples than seats."""
    sizes = [(32, 1), (33, 1), (20, 13), (20, 14), (32, 0), (33, 0), (1, 32), (1, 33), (31, 2), (1, 0)]
    edges = [(i, Request(f"r{i}", [i] * num_prompt, num_new)) for i, (num_prompt, num_new) in enumerate(sizes)]
    return [*edges, (10, Request("seats", [1, 2], 2, n=4)), (11, Request("no seats", [1, 2], 2, n=5))]


def _stream() -> Arrivals:
    """A large request among small ones that keep coming."""
    large = [(0, Request("first", [7] * 30, 20)), (2, Request("large", [8] * 40, 2))]
    return sorted(
        [*large, *((i, Request(f"small{i}", [i, i], 1)) for i in range(3, 60))], key=lambda arrival: arrival[0]
    )


def _tenants() -> Arrivals:
    """Two tenants, and one who shares with nobody, with the same prompts: each may hit its own blocks, and no other's."""
    prompts = [[5] * 9, [5] * 13, [6] * 8 + [7]]
    return [
        (i, Request(f"r{i}", prompts[i // 3 % 3], 6, salt=(b"tenant x", b"tenant y", b"")[i % 3])) for i in range(18)
    ]


def scheduler_scenarios() -> list[Scenario]:
    """All of them; the same in every run. Each takes some hundredths of a second with pagedkv's own scheduler.

    All have host blocks, for schedulers that swap; "few preemptions" has too few of them.
    """
    overload = _requests(3, 14, prompt=(1, 30), new=(4, 30), every=0)
    return [
        Scenario(
            "steady",
            SchedulerConfig(64, 8),
            CacheConfig(64, 4, 64),
            tuple(_requests(1, 12, prompt=(1, 20), new=(1, 9))),
        ),
        Scenario(
            "chunks",
            SchedulerConfig(8, 4, long_prefill_tokens=5, watermark=0),
            CacheConfig(40, 4, 40),
            tuple(_requests(2, 8, prompt=(10, 40), new=(1, 9))),
        ),
        Scenario("overload", SchedulerConfig(32, 8, watermark=0), CacheConfig(20, 4, 20), tuple(overload)),
        Scenario(
            "few preemptions",
            SchedulerConfig(32, 8, watermark=0, max_preemptions=1),
            CacheConfig(20, 4, 8),
            tuple(overload),
        ),
        Scenario("overload without names", SchedulerConfig(32, 8), CacheConfig(20, 4, 20, False), tuple(overload)),
        Scenario(
            "whole prompts",
            SchedulerConfig(40, 4, chunked_prefill=False),
            CacheConfig(24, 4, 24),
            tuple(_requests(4, 10, prompt=(1, 25), new=(1, 9))),
        ),
        Scenario(
            "shared beginnings",
            SchedulerConfig(32, 8, watermark=0),
            CacheConfig(24, 4, 24),
            tuple(_requests(5, 14, prompt=(1, 9), new=(1, 20), shared=13)),
        ),
        Scenario("two tenants", SchedulerConfig(32, 4, watermark=0), CacheConfig(24, 4, 24), tuple(_tenants())),
        Scenario(
            "several samples",
            SchedulerConfig(32, 8),
            CacheConfig(60, 4, 60),
            tuple(_requests(6, 9, prompt=(1, 9), new=(1, 12), n=3)),
        ),
        Scenario("edges", SchedulerConfig(16, 4), CacheConfig(8, 4, 8), tuple(_edges())),
        Scenario(
            "stream", SchedulerConfig(64, 16, watermark=0, max_bypasses=3), CacheConfig(16, 4, 16), tuple(_stream())
        ),
        Scenario(
            "aborts",
            SchedulerConfig(24, 4, watermark=0),
            CacheConfig(16, 4, 16),
            tuple(_requests(7, 16, prompt=(1, 20), new=(4, 20), every=0)),
            tuple((2 + 2 * i, f"r{(7 * i) % 16}") for i in range(12)),
        ),
    ]
