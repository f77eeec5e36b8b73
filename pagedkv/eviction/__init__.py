"""Which evictable block goes first: one protocol, one file per policy."""

from pagedkv.eviction.fifo import FIFO
from pagedkv.eviction.lru import LRU
from pagedkv.eviction.policies import POLICY_NAMES, make_policy
from pagedkv.eviction.protocol import EvictionPolicy
from pagedkv.eviction.s3fifo import S3FIFO
from pagedkv.eviction.sieve import SIEVE

__all__ = ["FIFO", "LRU", "POLICY_NAMES", "S3FIFO", "SIEVE", "EvictionPolicy", "make_policy"]
