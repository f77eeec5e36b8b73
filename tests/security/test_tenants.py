"""S3, S4, F15: tenants of different salts share nothing, and the one cannot tell what the other's tokens are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tenants import draw_traffic, run, with_other_tokens_of_b

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt
from pagedkv.eviction import POLICY_NAMES
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig

APART = {"a": b"tenant-a", "b": b"tenant-b"}
TOGETHER = {"a": b"", "b": b""}


def test_the_same_salt_hits_and_another_misses() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=16, block_size=2))
    prompt = [1, 2, 3, 4, 5]
    manager.open("first", prompt, salt=b"a")
    manager.append("first", 5)

    assert manager.open("own", prompt, salt=b"a") == 4
    assert manager.open("other", prompt, salt=b"b") == 0
    assert manager.open("none", prompt) == 0
    assert manager.open("longer", prompt, salt=b"a\0") == 0


@pytest.mark.parametrize("prompt", [[1, 2, 3], SimulatedPrompt(3)])
def test_memory_that_requires_salts_refuses_a_sequence_without(prompt: object) -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=16, block_size=2, requires_salt=True))
    scheduler = Scheduler(SchedulerConfig(), manager)
    assert manager.open("a", [1, 2, 3], salt=b"a") == 0
    scheduler.add(Request("a", [1, 2, 3], 1, salt=b"a"), 0.0)

    for refuse in (
        lambda: manager.open("b", prompt),
        lambda: manager.lookup(prompt, salt=b""),
        lambda: scheduler.add(Request("b", prompt, 1), 0.0),
    ):
        with pytest.raises(InvalidArgumentError, match="a sequence without a salt is refused"):
            refuse()
    assert len(manager) == 1


def twins(seed: int, salts: dict[str, bytes], **options: object) -> tuple[str, str]:
    rng = np.random.default_rng(seed)
    traffic = draw_traffic(rng)
    return run(traffic, salts, **options), run(with_other_tokens_of_b(traffic, rng), salts, **options)


@pytest.mark.parametrize("eviction", POLICY_NAMES)
@pytest.mark.parametrize("first_seed", range(0, 50, 10))
def test_what_a_tenant_sees_does_not_depend_on_another_s_tokens(eviction: str, first_seed: int) -> None:
    """10 twin runs for each of 4 policies and 5 seeds: 200 in all."""
    for seed in range(first_seed, first_seed + 10):
        first, second = twins(seed, APART, eviction=eviction)
        assert first == second, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("eviction", POLICY_NAMES)
def test_ten_thousand_twin_runs_see_the_same(eviction: str) -> None:
    for seed in range(1000, 3500):
        first, second = twins(seed, APART, eviction=eviction)
        assert first == second, f"seed {seed}"


def test_without_salts_the_same_twins_do_differ() -> None:
    """So the test above can fail: the traffic is such that tenants would hit each other's blocks."""
    differing = [seed for seed in range(50) if len(set(twins(seed, TOGETHER))) == 2]

    assert len(differing) > 25


@dataclass
class LongestPrefixFirst:
    """Orders the queue by what is cached already, as some engines do to raise their hit rate."""

    manager: KVCacheManager

    def rank(self, request: Request, now: float) -> float:
        content, num_tokens = self.manager.make_content(request.prompt, salt=request.salt)
        return -float(self.manager.memory.num_hit_blocks(content, num_tokens))


SECRET = [7, 1, 4, 4, 2, 9, 9, 3]
OTHER = [8, 8, 8, 8, 8, 8, 8, 8]
PROBES = [(3, "a-decoy", [5] * 9, 1), (3, "a-probe", [*SECRET, 1], 1)]
BUSY = [(2, f"a-busy{i}", [20 + i] * 8, 6) for i in range(4)]
"""They hold every seat while the probes wait, so that the queue's order shows."""


def order_of_probes(secret: list[int], salts: dict[str, bytes]) -> list[str]:
    """In which order the first tenant's own two requests come in, after the second tenant sent its secret."""
    log = run([(0, "b", [*secret, 0], 1), *BUSY, *PROBES], salts, policy=LongestPrefixFirst)
    admitted = [line for line in log.splitlines() if '"event": "admitted"' in line]
    names = [name for line in admitted for name in ("a-probe", "a-decoy") if name in line]
    return list(dict.fromkeys(names))


def test_longest_prefix_first_with_sharing_tells_whether_another_tenant_sent_a_guessed_prompt() -> None:
    """Order alone leaks, without any clock: why SECURITY.md warns of it."""
    assert order_of_probes(SECRET, TOGETHER) == ["a-probe", "a-decoy"]
    assert order_of_probes(OTHER, TOGETHER) == ["a-decoy", "a-probe"]


def test_with_a_salt_per_tenant_longest_prefix_first_tells_nothing() -> None:
    assert order_of_probes(SECRET, APART) == ["a-decoy", "a-probe"]
    assert order_of_probes(OTHER, APART) == ["a-decoy", "a-probe"]


def test_with_a_salt_per_tenant_twins_agree_under_longest_prefix_first() -> None:
    for seed in range(20):
        first, second = twins(seed, APART, policy=LongestPrefixFirst)
        assert first == second, f"seed {seed}"


def test_memory_that_requires_salts_says_that_simulated_prompts_have_none() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=16, block_size=2, requires_salt=True))
    with pytest.raises(InvalidArgumentError, match="and so is a simulated prompt, which has none"):
        manager.open("a", SimulatedPrompt(4))
