"""Does evicting cost more when more is cached?

n cached sequences, each one of 64 system prompts (256 tokens), one of 8 few-shot parts (128) and a tail of 32 to 512 of
its own, in blocks of 16; then 64 tokens (4 blocks) are evicted at a time. Peers: SGLang 0.5.23's radix cache in Python
and in Rust at a yardstick of 9.4 ms (docs/peers.md).
"""

from __future__ import annotations

import time

import numpy as np
from harness import Report, repeat

from pagedkv import CacheConfig, KVCacheManager

PEERS = {1_000: (94, 12), 10_000: (3175, 74), 30_000: (32_263, 202)}
NUM_CALLS = 100


def fill(num_sequences: int) -> KVCacheManager:
    """A manager whose pool is full of evictable blocks."""
    rng = np.random.default_rng(0)
    systems = rng.integers(0, 32_000, (64, 256))
    few_shots = rng.integers(0, 32_000, (8, 128))
    lengths = rng.integers(32, 513, num_sequences)
    num_blocks = 64 * 16 + 64 * 8 * 8 + int(np.ceil(lengths / 16).sum())
    manager = KVCacheManager(CacheConfig(num_blocks))
    for i, length in enumerate(lengths.tolist()):
        parts = systems[rng.integers(64)], few_shots[rng.integers(8)], rng.integers(0, 32_000, length)
        prompt = np.concatenate(parts).astype(np.int32)
        hit = manager.open(i, prompt)
        manager.append(i, len(prompt) - hit)
        manager.close(i)
    manager.memory.pool.allocate(manager.memory.pool.num_free)
    return manager


def main() -> None:
    report = Report(__doc__ or "")
    for num_sequences, (python, rust) in PEERS.items():
        pool = fill(num_sequences).memory.pool

        def measure(pool=pool) -> float:
            start = time.thread_time()
            for _ in range(NUM_CALLS):
                pool.allocate(4)
            return (time.thread_time() - start) / NUM_CALLS * 1e6

        target = {"target_us": 20} if num_sequences == 30_000 else {}
        report.add(f"evict 64 tokens, {num_sequences} sequences cached", repeat(measure), "us",
                   peer_sglang_python_us=python, peer_sglang_rust_us=rust, **target)  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
