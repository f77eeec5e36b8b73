"""What a sequence contains, as far as memory must know: the names of its full blocks, and its tokens, if real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from pagedkv.arrays import MAX_TOKENS, Int32s, Int64s, cdiv, keep_int
from pagedkv.block_keys import ExtraKey, Key, chain_keys, encode_extras
from pagedkv.errors import InvalidArgumentError

__all__ = ["MAX_TOKENS", "Content", "SimulatedContent", "SimulatedPrompt", "TokenContent"]

MAX_CONTENT_ID = 2**62
TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedPrompt:
    """A prompt of which only the length is known, and perhaps which blocks it shares with others.

    `content_ids[i]` names block i *and the whole prefix before it*, as the `hash_ids` of the Mooncake and Qwen-Bailian
    traces do: equal ids mean equal prefixes. `content_block_size` is the number of tokens that one id covers. There is
    one id for every full block; one more may stand for a last block that is only partly filled.
    """

    num_tokens: int
    content_ids: Int64s | Sequence[int] = ()
    content_block_size: int = 0

    def __post_init__(self) -> None:
        keep_int(self, "num_tokens", at_least=1, at_most=MAX_TOKENS)
        if isinstance(self.content_ids, range) and self.content_ids[self.num_tokens :]:
            raise InvalidArgumentError(f"{self.num_tokens} tokens have at most as many content ids, found more")
        try:
            ids = np.asarray(self.content_ids)
        except ValueError as error:
            raise InvalidArgumentError(f"content ids must be one row of whole numbers: {error}") from None
        if ids.ndim != 1:
            raise InvalidArgumentError(f"content ids must be one row of whole numbers, found shape {ids.shape}")
        num_ids = len(ids)
        keep_int(self, "content_block_size", at_least=1 if num_ids else 0, at_most=MAX_TOKENS)
        if num_ids == 0:
            return
        num_full, num_all = self.num_tokens // self.content_block_size, cdiv(self.num_tokens, self.content_block_size)
        if num_ids not in (num_full, num_all):
            raise InvalidArgumentError(
                f"{self.num_tokens} tokens in blocks of {self.content_block_size} have {num_full} or {num_all} "
                f"content ids, found {num_ids}"
            )
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= MAX_CONTENT_ID:
            raise InvalidArgumentError(f"content ids must be whole numbers in 0..2^62-1, found {ids.dtype}")
        if len(set(ids.tolist())) != num_ids:
            raise InvalidArgumentError("a content id names its whole prefix, so it occurs once in a prompt")

    def block_keys(self, block_size: int) -> list[Key]:
        """Names of the prompt's full blocks of `block_size` tokens, which must divide the ids' size or be divided by it."""
        num_full = self.num_tokens // block_size
        if len(self.content_ids) == 0 or num_full == 0:
            return []
        ids = np.asarray(self.content_ids, np.int64)
        if block_size % self.content_block_size == 0:
            # An id names its whole prefix, so the last id inside a larger block names that block.
            step = block_size // self.content_block_size
            keys = ids[step - 1 : num_full * step : step]
        elif self.content_block_size % block_size == 0:
            parts = self.content_block_size // block_size
            block_idx = np.arange(min(num_full, len(ids) * parts))
            if int(ids.max()) >= MAX_CONTENT_ID // parts:
                ids = ids.astype(object)  # Python integers, which do not wrap.
            keys = ids[block_idx // parts] * parts + block_idx % parts
        else:
            raise InvalidArgumentError(
                f"block_size {block_size} must divide, or be a multiple of, the content ids' {self.content_block_size}"
            )
        names: list[Key] = keys.tolist()
        return names


class TokenContent:
    """Real tokens. Keys are hashed on demand, each once, and kept for the next lookup of the same sequence."""

    __slots__ = ("_block_bytes", "_data", "_extras", "_keys", "_root")

    def __init__(self, token_ids: Int32s, block_size: int, root: bytes, extras: tuple[ExtraKey, ...] = ()) -> None:
        self._data = bytearray(np.ascontiguousarray(token_ids, "<i4").tobytes())
        self._block_bytes = block_size * TOKEN_BYTES
        self._root = root
        self._extras = extras
        self._keys: list[bytes] = []

    def keys(self, num_blocks: int) -> Sequence[Key]:
        """Names of the first `num_blocks` blocks at least; there must be that many full ones. Hashes only new ones."""
        keys = self._keys
        if len(keys) < num_blocks:
            start, stop = len(keys) * self._block_bytes, num_blocks * self._block_bytes
            parent = keys[-1] if keys else self._root
            if self._extras:
                self._chain_with_extras(parent, num_blocks)
            else:
                keys += chain_keys(parent, self._data[start:stop], self._block_bytes)
        return keys

    def key(self, block_idx: int) -> Key:
        """Name of one full block; O(1) once those before it are hashed."""
        keys = self._keys
        if block_idx == len(keys) and not self._extras:  # Mostly: one that a decode has filled.
            start = block_idx * self._block_bytes
            tokens = self._data[start : start + self._block_bytes]
            keys.append(sha256((keys[-1] if keys else self._root) + tokens).digest())
        elif block_idx >= len(keys):
            self.keys(block_idx + 1)
        return keys[block_idx]

    def _chain_with_extras(self, key: bytes, num_blocks: int) -> None:
        size = self._block_bytes // TOKEN_BYTES
        for block_idx in range(len(self._keys), num_blocks):
            tokens = self._data[block_idx * self._block_bytes : (block_idx + 1) * self._block_bytes]
            extras = encode_extras(self._extras, block_idx * size, (block_idx + 1) * size)
            key = sha256(key + tokens + extras).digest()
            self._keys.append(key)

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds; those of a row's last block are written when the row is synchronised. O(1)."""
        return len(self._data) // TOKEN_BYTES

    def token_ids(self, start: int, stop: int) -> Int32s:
        """Tokens `start` to `stop - 1`, (stop - start,) int32, a copy."""
        return np.frombuffer(bytes(self._data[start * TOKEN_BYTES : stop * TOKEN_BYTES]), "<i4")

    def write(self, start: int, token_ids: Int32s) -> None:
        """Replace everything from token `start` on; names of blocks that are no longer full and equal are dropped."""
        start *= TOKEN_BYTES
        if start < len(self._data):
            del self._data[start:]
            del self._keys[start // self._block_bytes :]
        self._data += token_ids.tobytes()

    def write_block(self, block_idx: int, tokens: bytes) -> None:
        """Replace everything from block `block_idx` on by one full block, its tokens as little-endian int32. O(block_size)."""
        data, start = self._data, block_idx * self._block_bytes
        if start < len(data):
            del data[start:]
            del self._keys[block_idx:]
        data += tokens

    def fork(self, num_tokens: int) -> TokenContent:
        """A copy of the first `num_tokens` tokens that continues on its own."""
        child = TokenContent.__new__(TokenContent)
        child._data = self._data[: num_tokens * TOKEN_BYTES]
        child._block_bytes = self._block_bytes
        child._root = self._root
        child._extras = self._extras
        child._keys = self._keys[: num_tokens * TOKEN_BYTES // self._block_bytes]
        return child


class SimulatedContent:
    """Content by name only: the prompt's ids, then names that no other sequence has.

    Names beyond the prompt's are negative, `-(serial * 2^26 + block index) - 1`, so that a preempted sequence finds its
    own blocks again and never another's.
    """

    __slots__ = ("_prompt_keys", "base")

    def __init__(self, prompt_keys: list[Key], serial: int) -> None:
        self._prompt_keys = prompt_keys
        self.base = -(serial * MAX_TOKENS) - 1
        """Block i beyond the named ones is `base - i`."""

    def keys(self, num_blocks: int) -> Sequence[Key]:
        """Names of the first `num_blocks` blocks at least."""
        num_named = len(self._prompt_keys)
        if num_named == 0:
            return range(self.base, self.base - num_blocks, -1)
        if num_blocks <= num_named:
            return self._prompt_keys
        return [*self._prompt_keys, *range(self.base - num_named, self.base - num_blocks, -1)]

    def key(self, block_idx: int) -> Key:
        """Name of one block. O(1)."""
        keys = self._prompt_keys
        return keys[block_idx] if block_idx < len(keys) else self.base - block_idx

    def truncate(self, num_blocks: int, serial: int) -> None:
        """Give what follows the first `num_blocks` blocks new names: it will be other content."""
        self._prompt_keys = list(self.keys(num_blocks))[:num_blocks]
        self.base = -(serial * MAX_TOKENS) - 1

    def fork(self, num_blocks: int, serial: int) -> SimulatedContent:
        """A copy that shares the first `num_blocks` names and has its own from there."""
        return SimulatedContent(list(self.keys(num_blocks))[:num_blocks], serial)


Content = TokenContent | SimulatedContent
