"""KV-cache memory manager and continuous-batching scheduler that inference engines embed.

The core moves integers only; `pagedkv.scheduler` decides who runs next, `pagedkv.simulations` replays request traces
through that very scheduler.
"""

from pagedkv.block_keys import CacheIdentity, ExtraKey
from pagedkv.block_pool import BlockPool
from pagedkv.config import CacheConfig
from pagedkv.content import SimulatedPrompt
from pagedkv.errors import (
    BlockStateError,
    ConfigError,
    DuplicateIdError,
    InvalidArgumentError,
    InvariantViolation,
    OutOfBlocksError,
    PagedKVError,
    SavedBlocksError,
    StalePlanError,
    TraceError,
    UnknownIdError,
)
from pagedkv.kv_spec import KVSpec
from pagedkv.manager import Appended, KVCacheManager, PrefixHit
from pagedkv.plans import BlockCopies
from pagedkv.prefix_cache import PrefixCache
from pagedkv.statistics import HitRateWindow, MemoryStatistics

__version__ = "0.1.0"

__all__ = [
    "Appended",
    "BlockCopies",
    "BlockPool",
    "BlockStateError",
    "CacheConfig",
    "CacheIdentity",
    "ConfigError",
    "DuplicateIdError",
    "ExtraKey",
    "HitRateWindow",
    "InvalidArgumentError",
    "InvariantViolation",
    "KVCacheManager",
    "KVSpec",
    "MemoryStatistics",
    "OutOfBlocksError",
    "PagedKVError",
    "PrefixCache",
    "PrefixHit",
    "SavedBlocksError",
    "SimulatedPrompt",
    "StalePlanError",
    "TraceError",
    "UnknownIdError",
    "__version__",
]
