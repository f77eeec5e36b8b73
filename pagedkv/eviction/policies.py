"""Policies by name, as a command line or a configuration file gives them."""

from __future__ import annotations

from collections.abc import Callable

from pagedkv.arrays import shown
from pagedkv.errors import ConfigError
from pagedkv.eviction.fifo import FIFO
from pagedkv.eviction.lru import LRU
from pagedkv.eviction.protocol import EvictionPolicy
from pagedkv.eviction.s3fifo import S3FIFO
from pagedkv.eviction.sieve import SIEVE

__all__ = ["POLICY_NAMES", "make_policy"]

POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    LRU.name: LRU,
    FIFO.name: FIFO,
    S3FIFO.name: S3FIFO,
    SIEVE.name: SIEVE,
}

POLICY_NAMES = tuple(POLICIES)
"""Every name that `make_policy` knows, the default first."""


def make_policy(name: str, num_blocks: int) -> EvictionPolicy:
    """Build the policy of this name for a pool of `num_blocks` blocks.

    Raises ConfigError, listing the names, for any other.

    >>> make_policy("sieve", 8).name
    'sieve'
    """
    if not isinstance(name, str) or name not in POLICIES:
        raise ConfigError(f"eviction policy must be one of {', '.join(POLICY_NAMES)}, found {shown(name)}")
    return POLICIES[name](num_blocks)
