"""A prefix cache driven by strings: the prefixes of "abc" are the blocks a, ab and abc."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagedkv import BlockPool, PrefixCache
from pagedkv.eviction import EvictionPolicy


class Chains:
    """Opens sequences as the memory manager does: hits are pinned, the rest is allocated and named."""

    def __init__(self, num_blocks: int, policy: EvictionPolicy) -> None:
        self.pool = BlockPool(num_blocks, policy)
        self.cache = PrefixCache(self.pool)

    def open(self, text: str) -> np.ndarray:
        """Hold the blocks of a text, front first."""
        keys = [text[:stop].encode() for stop in range(1, len(text) + 1)]
        num_hit = self.cache.num_resident(keys, len(keys))
        hits = self.cache.blocks(keys, num_hit)
        self.pool.acquire(hits)
        new = self.pool.allocate(len(keys) - num_hit)
        if len(new):
            self.cache.name_chain(keys[num_hit:], new, int(hits[-1]) if num_hit else -1)
        return np.concatenate((hits, new))

    def close(self, blocks: np.ndarray) -> None:
        self.pool.release(blocks[::-1])
        self.pool.check_invariants()
        self.cache.check_invariants()

    def use(self, *texts: str) -> None:
        """Open and close one text after the other."""
        for text in texts:
            self.close(self.open(text))

    def unname(self, *texts: str) -> None:
        keys = [text.encode() for text in texts]
        self.cache.unname(np.concatenate([self.cache.blocks([key], 1) for key in keys]))
        self.pool.check_invariants()

    def text(self, block: int) -> str:
        key = self.cache.key_of(block)
        assert isinstance(key, bytes)
        return key.decode()

    @property
    def order(self) -> list[str]:
        """Evictable blocks, first to go first."""
        return [self.text(block) for block in self.pool.policy.order()]

    def has(self, text: str) -> bool:
        return self.cache.num_resident([text.encode()], 1) == 1


@pytest.fixture
def chains() -> Callable[[EvictionPolicy, int], Chains]:
    """Make a cache of so many blocks with this policy."""

    def make(policy: EvictionPolicy, num_blocks: int) -> Chains:
        return Chains(num_blocks, policy)

    return make
