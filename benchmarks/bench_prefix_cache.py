"""What do looking up, hashing and naming a long prompt cost?

A prompt of 32,768 tokens in blocks of 16. Peer: vLLM 0.33 at a yardstick of 9.4 ms (docs/peers.md).
"""

from __future__ import annotations

import time

import numpy as np
from harness import Report, repeat

from pagedkv import CacheConfig, KVCacheManager

NUM_TOKENS = 32_768


def main() -> None:
    report = Report(__doc__ or "")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32_000, NUM_TOKENS).astype(np.int32)
    manager = KVCacheManager(CacheConfig(num_blocks=4096))
    manager.open("first", tokens)
    manager.append("first", NUM_TOKENS)
    memory = manager.memory
    content, num_known = manager.make_content(tokens)

    def hash_all() -> float:
        fresh, _ = manager.make_content(tokens)
        start = time.thread_time()
        fresh.keys(NUM_TOKENS // 16)
        return (time.thread_time() - start) * 1e6

    def find() -> float:
        start = time.thread_time()
        num_hit = memory.num_hit_blocks(content, num_known)
        blocks = memory.hit_blocks(content, num_hit)
        seconds = time.thread_time() - start
        assert len(blocks) == 2047
        return seconds * 1e6

    def pin_and_drop() -> float:
        blocks = memory.hit_blocks(content, memory.num_hit_blocks(content, num_known))
        start = time.thread_time()
        memory.pool.acquire(blocks)
        memory.pool.release(blocks[::-1])
        return (time.thread_time() - start) * 1e6

    def miss() -> float:
        other, _ = manager.make_content(tokens, salt=b"other")
        other.keys(2047)
        start = time.thread_time()
        memory.num_hit_blocks(other, num_known)
        return (time.thread_time() - start) * 1e6

    content.keys(2047)
    report.add("lookup, all hit (2047 blocks)", repeat(find, 50), "us", peer_vllm_us=1207, target_us=150)
    report.add("lookup, no hit", repeat(miss, 20), "us", peer_vllm_us=2.05)
    report.add("hashing 2048 blocks", repeat(hash_all, 50), "us", peer_vllm_us=3420, target_us=1700)
    report.add("pinning and dropping the hit, blocks in use", repeat(pin_and_drop, 50), "us")
    manager.close("first")
    report.add("pinning and dropping the hit, blocks evictable", repeat(pin_and_drop, 50), "us", peer_vllm_us=380)
    report.write()


if __name__ == "__main__":
    main()
