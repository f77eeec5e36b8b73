"""The inherited tests, on the allocators that must pass them."""

from __future__ import annotations

import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.testing import AllocatorTests, Capabilities, ManagerAllocator, ReferenceAllocator
from pagedkv.testing.allocator_verification import verify
from pagedkv.testing.manager_allocator import make_allocator


class TestManager(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return make_allocator(num_blocks, block_size, num_host_blocks)


class TestReference(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return ReferenceAllocator(num_blocks, block_size, num_host_blocks)


class Uncached(ManagerAllocator):
    """A manager that keeps no prefixes."""

    capabilities = Capabilities(prefix_caching=False)


class TestManagerWithoutPrefixCaching(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        config = CacheConfig(num_blocks, block_size, num_host_blocks, prefix_caching=False)
        return Uncached(KVCacheManager(config))


class Plain(ReferenceAllocator):
    """Takes all of a prompt's blocks at once, then one token at a time, and does nothing else."""

    capabilities = Capabilities(
        salts=False,
        forking=False,
        truncating=False,
        swapping=False,
        chunked_prefill=False,
        exact_hits=False,
        eviction="any",
        checks_ids=False,
    )

    def open(self, sequence_id, token_ids, *, salt=b""):
        num_hit = self.lookup(token_ids)
        sequence = None
        try:
            super().open(sequence_id, token_ids)
            sequence = self.sequences[sequence_id]
            super().append(sequence_id, len(token_ids) - num_hit)
        except Exception:
            if sequence is not None:
                before = self.evictable[:]
                super().close(sequence_id)
                self.evictable = before + [block_id for block_id in self.evictable if block_id not in before]
            raise
        return num_hit

    def state(self):
        """What a refused prompt had hit may move to the end of the queue: this allocator does not promise an order."""
        return sorted(self.free), sorted(self.evictable), dict(self.block_of)


class TestAllocatorWithFewCapabilities(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return Plain(num_blocks, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_manager_passes_a_hundred_thousand_random_calls(seed: int) -> None:
    report = verify(make_allocator, num_operations=100_000, seed=seed)

    assert report.failure is None
