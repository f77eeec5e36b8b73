"""Names of full blocks: a SHA-256 chain over an injective, versioned encoding.

    root      = SHA256(scheme | model | kv dtype | block size | salt | adapter), every field length-prefixed
    key of i  = SHA256(key of i-1, or root | tokens of block i as little-endian int32 | extras of block i)

A key thus depends on the whole prefix and on everything that changes the content of a block. A block without extras
hashes exactly 32 + 4 * block_size bytes; extras start with a tag and a count, so that no two inputs encode alike.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TypeAlias

from pagedkv.arrays import keep_int
from pagedkv.errors import InvalidArgumentError

__all__ = [
    "CacheIdentity",
    "ExtraKey",
    "Key",
    "MAX_EXTRAS",
    "MAX_SALT_BYTES",
    "as_extras",
    "chain_keys",
    "check_adapter",
    "check_salt",
    "encode_extras",
    "root_key",
]

Key: TypeAlias = bytes | int
"""A block's name: 32 bytes of SHA-256 over token content, or the id that a trace gives to simulated content."""

SCHEME = b"pagedkv-block-key-v1"
MAX_SALT_BYTES = 64
MAX_TEXT_BYTES = 4096
MAX_POSITION = 2**62
MAX_EXTRAS = 1024
"""Documented cap on the items of one prompt."""


@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """What makes two caches incompatible although their tokens agree: the model and the type of its K/V."""

    model: str = ""
    kv_dtype: str = ""

    def __post_init__(self) -> None:
        _text("model", self.model)
        _text("kv_dtype", self.kv_dtype)


@dataclass(frozen=True, slots=True)
class ExtraKey:
    """An item (an image, say) that stands behind the placeholder tokens `start` to `stop - 1` of a prompt.

    `digest` identifies its content: two prompts share a block only if it covers the same part of the same item.
    """

    start: int
    stop: int
    digest: bytes

    def __post_init__(self) -> None:
        keep_int(self, "start", at_least=0, at_most=MAX_POSITION)
        keep_int(self, "stop", at_least=self.start + 1, at_most=MAX_POSITION)
        if not isinstance(self.digest, bytes) or not 1 <= len(self.digest) <= MAX_SALT_BYTES:
            raise InvalidArgumentError(f"an extra key's digest must be 1 to {MAX_SALT_BYTES} bytes")


def _field(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _text(name: str, value: str) -> bytes:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, found {type(value).__name__}")
    # Before it is encoded: a character takes at least one byte.
    data = value[: MAX_TEXT_BYTES + 1].encode("utf-8", "surrogatepass")
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidArgumentError(f"{name} must be at most {MAX_TEXT_BYTES} bytes, found more")
    return data


def check_salt(salt: bytes) -> None:
    """Raise InvalidArgumentError, which does not show it, unless this is a salt: at most 64 bytes. O(1)."""
    if not isinstance(salt, bytes):
        raise InvalidArgumentError(f"salt must be bytes, at most {MAX_SALT_BYTES} of them, found {type(salt).__name__}")
    if len(salt) > MAX_SALT_BYTES:
        raise InvalidArgumentError(f"salt must be at most {MAX_SALT_BYTES} bytes, found {len(salt)}")


def check_adapter(adapter: str | None) -> None:
    """Raise InvalidArgumentError unless this is None or the name of an adapter: at most 4096 bytes of UTF-8. O(n)."""
    if adapter is not None:
        _text("adapter", adapter)


def root_key(identity: CacheIdentity, block_size: int, *, salt: bytes = b"", adapter: str | None = None) -> bytes:
    """The parent of every first block: equal for two sequences exactly if they may share blocks at all.

    `salt` is any bytes, at most 64: sequences with different salts share nothing. `adapter` names a LoRA or the like.

    >>> root_key(CacheIdentity(), 16).hex()[:16]
    'bef658abb1b3a2bd'
    """
    check_salt(salt)
    adapter_field = b"\0" if adapter is None else b"\1" + _field(_text("adapter", adapter))
    encoded = (
        _field(SCHEME)
        + _field(_text("model", identity.model))
        + _field(_text("kv_dtype", identity.kv_dtype))
        + struct.pack("<Q", block_size)
        + _field(salt)
        + adapter_field
    )
    return sha256(encoded).digest()


def as_extras(values: Iterable[ExtraKey]) -> tuple[ExtraKey, ...]:
    """Return the items as a tuple. Raises InvalidArgumentError unless all are ExtraKeys, at most 1024 of them."""
    extras = tuple(islice(values, MAX_EXTRAS + 1)) if isinstance(values, Iterable) else (values,)
    if len(extras) > MAX_EXTRAS:
        raise InvalidArgumentError(f"a prompt has at most {MAX_EXTRAS} extras, found more")
    for extra in extras:
        if not isinstance(extra, ExtraKey):
            raise InvalidArgumentError(f"extras must be ExtraKey items, found {type(extra).__name__}")
    return extras


def encode_extras(extras: Sequence[ExtraKey], start: int, stop: int) -> bytes:
    """Encode the items that reach into tokens `start` to `stop - 1`, with their offset relative to `start`."""
    inside = [extra for extra in extras if extra.start < stop and extra.stop > start]
    if not inside:
        return b""
    items = b"".join(
        _field(extra.digest) + struct.pack("<qq", extra.start - start, extra.stop - start) for extra in inside
    )
    return b"\1" + struct.pack("<Q", len(inside)) + items


def chain_keys(parent: bytes, data: bytes | bytearray, block_bytes: int) -> list[bytes]:
    """Keys of the full blocks in `data` (token ids as little-endian int32), the first continuing `parent`.

    O(len(data)): about 0.5 us a block of 16 tokens, nearly all of it in SHA-256.
    """
    keys: list[bytes] = []
    append = keys.append
    new_hash = sha256
    key = parent
    view = bytes(data)
    for start in range(0, len(view) - block_bytes + 1, block_bytes):
        key = new_hash(key + view[start : start + block_bytes]).digest()
        append(key)
    return keys
