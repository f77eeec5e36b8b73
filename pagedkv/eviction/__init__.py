"""Which evictable block goes first: one protocol, one file per policy."""

from pagedkv.eviction.lru import LRU
from pagedkv.eviction.protocol import EvictionPolicy

__all__ = ["LRU", "EvictionPolicy"]
