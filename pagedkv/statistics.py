"""Counters: how much the prefix cache was asked and gave, and how well the pool is used."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pagedkv.arrays import as_int

__all__ = ["HitRateWindow", "MemoryStatistics", "PrefixCounters"]

MAX_REQUESTS = 2**31


@dataclass(slots=True)
class PrefixCounters:
    """Tokens and blocks looked up and hit since the start. Sequences that come back after a preemption count apart."""

    num_queries: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    queried_blocks: int = 0
    hit_blocks: int = 0
    num_resumed_queries: int = 0
    resumed_queried_tokens: int = 0
    resumed_hit_tokens: int = 0

    def record(self, num_tokens: int, num_hit_blocks: int, block_size: int, *, resumed: bool = False) -> None:
        """Count one lookup that led to an admission. O(1)."""
        if resumed:
            self.num_resumed_queries += 1
            self.resumed_queried_tokens += num_tokens
            self.resumed_hit_tokens += num_hit_blocks * block_size
        else:
            self.num_queries += 1
            self.queried_tokens += num_tokens
            self.hit_tokens += num_hit_blocks * block_size
            self.queried_blocks += num_tokens // block_size
            self.hit_blocks += num_hit_blocks


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """One look at the memory. Blocks in use, cached and free are apart; `num_blocks` is their sum."""

    num_blocks: int
    num_used: int
    num_evictable: int
    num_free: int
    num_host_blocks: int
    num_host_used: int
    num_pinned: int
    """Blocks that lookups hold which were neither opened nor dropped; a block counts for each."""
    num_sequences: int
    num_slots: int
    """Token slots in the block tables of live sequences; a shared block counts for each."""
    num_tokens: int
    """Tokens in those slots."""
    prefix: PrefixCounters

    @property
    def utilization(self) -> float:
        """Share of the device blocks that some sequence holds, 0..1."""
        return self.num_used / self.num_blocks

    @property
    def internal_fragmentation(self) -> float:
        """Share of the held slots that hold no token, 0..1."""
        return 1 - self.num_tokens / self.num_slots if self.num_slots else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the queried tokens that were hit; None before the first query."""
        return self.prefix.hit_tokens / self.prefix.queried_tokens if self.prefix.queried_tokens else None


class HitRateWindow:
    """Hit rate over the most recent requests, in whole records: the oldest go once more than `max_requests` are held.

    >>> window = HitRateWindow(max_requests=5)
    >>> window.record(1, num_queried=20, num_hit=9)
    >>> window.hit_rate
    0.45
    """

    __slots__ = ("_num_hit", "_num_queried", "_num_requests", "_records", "max_requests")

    def __init__(self, max_requests: int = 1000) -> None:
        self.max_requests = as_int("max_requests", max_requests, at_least=1, at_most=MAX_REQUESTS)
        self.reset()

    def record(self, num_requests: int, *, num_queried: int, num_hit: int) -> None:
        """Add what a number of requests queried and hit. O(1) amortised."""
        self._records.append((num_requests, num_queried, num_hit))
        self._num_requests += num_requests
        self._num_queried += num_queried
        self._num_hit += num_hit
        while len(self._records) > 1 and self._num_requests > self.max_requests:
            old_requests, old_queried, old_hit = self._records.popleft()
            self._num_requests -= old_requests
            self._num_queried -= old_queried
            self._num_hit -= old_hit

    @property
    def hit_rate(self) -> float | None:
        """Tokens hit per token queried; None where nothing was queried, which is not the same as no hit."""
        return self._num_hit / self._num_queried if self._num_queried else None

    def reset(self) -> None:
        """Forget every record."""
        self._records: deque[tuple[int, int, int]] = deque()
        self._num_requests = self._num_queried = self._num_hit = 0
