"""Block keys that collide: the same 32 bytes, but a hash of four bits, so that the map must compare keys all the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagedkv.block_keys import ExtraKey, Key
from pagedkv.content import Content, TokenContent
from pagedkv.manager import KVCacheManager, Prompt

__all__ = ["NarrowHashManager"]


class NarrowKey(bytes):
    """A key that falls into one of sixteen places of a dictionary."""

    __slots__ = ()

    def __hash__(self) -> int:
        return self[0] & 15

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other) if isinstance(other, bytes) else NotImplemented


class NarrowContent(TokenContent):
    """Real tokens whose keys collide in every map."""

    __slots__ = ()

    def keys(self, num_blocks: int) -> Sequence[Key]:
        """As TokenContent.keys, collidingly hashed."""
        keys = super().keys(num_blocks)
        return [NarrowKey(key) for key in keys if isinstance(key, bytes)]

    def key(self, block_idx: int) -> Key:
        """As TokenContent.key, collidingly hashed."""
        key = TokenContent.keys(self, block_idx + 1)[block_idx]
        return NarrowKey(key) if isinstance(key, bytes) else key

    def fork(self, num_tokens: int) -> TokenContent:
        """As TokenContent.fork; the copy's keys collide, too."""
        child = super().fork(num_tokens)
        child.__class__ = NarrowContent
        return child


class NarrowHashManager(KVCacheManager):
    """A manager whose block keys hash to four bits. Names are compared in full, so nothing may be hit that is not equal."""

    def make_content(
        self, prompt: Prompt, *, salt: bytes = b"", adapter: str | None = None, extras: Iterable[ExtraKey] = ()
    ) -> tuple[Content, int]:
        """As KVCacheManager.make_content."""
        content, num_tokens = super().make_content(prompt, salt=salt, adapter=adapter, extras=extras)
        if type(content) is TokenContent:
            content.__class__ = NarrowContent
        return content, num_tokens
