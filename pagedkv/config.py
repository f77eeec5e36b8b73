"""How large the memory is and what it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagedkv.arrays import keep_int, shown
from pagedkv.block_keys import CacheIdentity
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.errors import ConfigError, InvalidArgumentError

__all__ = ["MAX_BLOCK_SIZE", "CacheConfig", "require_kind", "require_object"]

MAX_BLOCK_SIZE = 2**16


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Sizes of the two pools and of a block.

    `num_blocks` device blocks of `block_size` token slots each; `num_host_blocks` of the same size for swapping;
    `prefix_caching` names full blocks for reuse; `identity` keeps caches of different models apart. With `requires_salt`
    no sequence may be opened without a salt: for memory that tenants share, so that none is forgotten.
    """

    num_blocks: int
    block_size: int = 16
    num_host_blocks: int = 0
    prefix_caching: bool = True
    identity: CacheIdentity = field(default_factory=CacheIdentity)
    requires_salt: bool = False

    def __post_init__(self) -> None:
        try:
            keep_int(self, "num_blocks", at_least=1, at_most=MAX_NUM_BLOCKS)
            keep_int(self, "block_size", at_least=1, at_most=MAX_BLOCK_SIZE)
            keep_int(self, "num_host_blocks", at_least=0, at_most=MAX_NUM_BLOCKS)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        for name in ("prefix_caching", "requires_salt"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, found {shown(getattr(self, name))}")
        if not isinstance(self.identity, CacheIdentity):
            raise ConfigError(f"identity must be a CacheIdentity, found {type(self.identity).__name__}")


def require_kind(name: str, value: object, kind: type) -> None:
    """Raise ConfigError unless `value` is one of this class."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be a {kind.__name__}, found {_told(value)}")


def require_object(name: str, value: object, verb: str, example: str) -> None:
    """Raise ConfigError unless `value` is an object with this method: not its name, as commands take it, nor its class."""
    if isinstance(value, type) or not callable(getattr(value, verb, None)):
        raise ConfigError(f"{name} must be an object such as {example}, found {_told(value)}")


def _told(value: object) -> str:
    """What was found instead. No repr but that of a text: others may hold an address, which differs from run to run."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return shown(value) if isinstance(value, str) else f"one of type {type(value).__name__}"
