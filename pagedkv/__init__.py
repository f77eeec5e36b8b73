"""KV-cache memory manager and continuous-batching scheduler that inference engines embed.

The core moves integers only; `pagedkv.scheduler` decides who runs next, `pagedkv.simulations` replays request traces
through that very scheduler. What is named here is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Imported on demand: pytest loads `pagedkv.testing.pytest_plugin` in every project where pagedkv is installed, and with
# it this package; numpy would be paid for by tests that never touch it.
_MODULE_OF = {
    "CacheIdentity": "block_keys",
    "ExtraKey": "block_keys",
    "BlockPool": "block_pool",
    "CacheConfig": "config",
    "SimulatedPrompt": "content",
    "BlockStateError": "errors",
    "ConfigError": "errors",
    "DuplicateIdError": "errors",
    "InvalidArgumentError": "errors",
    "InvariantViolation": "errors",
    "OutOfBlocksError": "errors",
    "PagedKVError": "errors",
    "SavedBlocksError": "errors",
    "StalePlanError": "errors",
    "TraceError": "errors",
    "UnknownIdError": "errors",
    "KVSpec": "kv_spec",
    "Appended": "manager",
    "KVCacheManager": "manager",
    "PrefixHit": "manager",
    "BlockCopies": "plans",
    "PrefixCache": "prefix_cache",
    "HitRateWindow": "statistics",
    "MemoryStatistics": "statistics",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
