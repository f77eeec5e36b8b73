"""How fast are blocks taken, given back and evicted, and how does that grow with the pool?

Peer: vLLM 0.33's block pool, at a yardstick of 14.3 ms (docs/peers.md).
"""

from __future__ import annotations

import time
import tracemalloc
from hashlib import sha256

from harness import Report, repeat, time_once

from pagedkv import BlockPool, PrefixCache

NUM_CALLS = 300


def cached_pool(num_blocks: int) -> BlockPool:
    """A pool in which every block is evictable, named by SHA-256 keys of sequences of 25 blocks."""
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    keys = [sha256(i.to_bytes(8, "little")).digest() for i in range(num_blocks)]
    for start in range(0, num_blocks, 25):
        blocks = pool.allocate(25)
        cache.name_chain(keys[start : start + 25], blocks, -1)
        pool.release(blocks[::-1])
    assert pool.num_evictable == num_blocks
    return pool


def evicting_take(num_blocks: int) -> dict[str, float]:
    pool = cached_pool(num_blocks)

    def measure() -> float:
        start = time.thread_time()
        for _ in range(NUM_CALLS // 10):
            pool.try_allocate(32)
        return NUM_CALLS // 10 * 32 / (time.thread_time() - start) / 1e6

    return repeat(measure, 9)


def pairs(num_blocks: int, size: int) -> dict[str, float]:
    pool = BlockPool(num_blocks)

    def measure() -> float:
        start = time.thread_time()
        for _ in range(NUM_CALLS):
            pool.release(pool.allocate(size))
        return NUM_CALLS * size / (time.thread_time() - start) / 1e6

    return repeat(measure)


def main() -> None:
    report = Report(__doc__ or "")
    peers = {10_000: 1.83, 100_000: 0.83, 1_000_000: 0.78}
    for num_blocks, peer in peers.items():
        target = {"target": 5.0} if num_blocks == 1_000_000 else {}
        what = f"evicting take of 32 from {num_blocks} cached blocks"
        report.add(what, evicting_take(num_blocks), "M blocks/s", peer_vllm=peer, **target)
    for num_blocks, size, peer in ((1_000_000, 1, 1.47), (1_000_000, 32, 5.74), (1_000_000, 1024, 6.84)):
        what = f"take and give back {size} of {num_blocks}, caching off"
        report.add(what, pairs(num_blocks, size), "M blocks/s", peer_vllm=peer)
    for num_blocks, peer in ((10_000, 4), (100_000, 79), (1_000_000, 1075)):
        target = {"target_ms": 20} if num_blocks == 1_000_000 else {}
        figures = repeat(lambda n=num_blocks: time_once(lambda: PrefixCache(BlockPool(n))) * 1e3)
        report.add(f"build a pool of {num_blocks} with its cache", figures, "ms", peer_vllm_ms=peer, **target)
    tracemalloc.start()
    held = PrefixCache(BlockPool(1_000_000))
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    per_block = num_bytes / 1_000_000
    del held
    report.add("memory of a pool of 1000000 with its cache", dict.fromkeys(("median", "min", "max"), per_block),
               "bytes/block", peer_vllm=136, target=40)  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
