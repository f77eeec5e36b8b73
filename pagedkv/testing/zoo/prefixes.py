"""Bugs in naming, finding and evicting cached prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.testing.reference_allocator import Key, ReferenceSequence
from pagedkv.testing.zoo.known_bad import KnownBad

__all__ = ["PREFIXES"]


class NothingIsHit(KnownBad):
    """The cache is filled and never asked. A test that looks for wrong content alone is content."""

    invariant = "I3"

    def longest_hit(self, sequence: ReferenceSequence) -> int:  # noqa: ARG002 - that is the bug
        return 0


class WholePromptIsHit(KnownBad):
    """A prompt that is cached to its end leaves no token to compute."""

    invariant = "I3"

    def longest_hit(self, sequence: ReferenceSequence) -> int:
        return len(sequence.tokens)


class SaltIsLeftOut(KnownBad):
    """Tenants with different salts hit each other's blocks."""

    invariant = "I3"

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        return b"", super().key(sequence, block_idx)[1]


class SaltIsAYesOrNo(KnownBad):
    """All tenants that have a salt share one cache."""

    invariant = "I3"

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        return (b"salted" if salt else b""), tokens


class SaltIsCutShort(KnownBad):
    """Of a salt the last bytes are left out, so that long ones look alike."""

    invariant = "I3"

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        return salt[:32], tokens


class TokensAreCutTo16Bits(KnownBad):
    """Names hold the low halves of token ids, which two tokens of a large vocabulary share."""

    invariant = "I3"

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        return salt, tuple(token % 2**16 for token in tokens)


class TokensAreTakenModuloAPrime(KnownBad):
    """Names hold remainders, as of a rolling hash that is never compared: the last token of 31 bits is as good as 0."""

    invariant = "I3"

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        return salt, tuple(token % (2**31 - 1) for token in tokens)


class KeyForgetsThePrefix(KnownBad):
    """A block is named by its own tokens alone, so it is hit behind any prefix."""

    invariant = "I3"
    consequences = ("I5", "I7")

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        return salt, (block_idx, *tokens[-self.block_size :])


class FourBitHash(KnownBad):
    """Keys are hashed to four bits and never compared."""

    invariant = "I3"
    consequences = ("I5", "I7")

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        salt, tokens = super().key(sequence, block_idx)
        number = len(salt) + len(tokens)
        for token in tokens:
            number = (number * 31 + token) % 16
        return b"", (number,)


class NamedBeforeItIsFull(KnownBad):
    """A block that holds part of its tokens is registered with all of those that the prompt has."""

    invariant = "I3"
    consequences = ("I5", "I7")

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.early: set[int] = set()

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        tail = sequence.blocks[-1] if sequence.blocks else -1
        return super().needs_copy(sequence) and (self.num_holders[tail] > 1 or tail not in self.early)

    def name_full_blocks(self, sequence: ReferenceSequence, first: int) -> None:
        self.early -= set(sequence.blocks)
        super().name_full_blocks(sequence, first)
        if sequence.num_named > sequence.num_computed // self.block_size:
            self.early.add(sequence.blocks[-1])

    def num_full_blocks(self, sequence: ReferenceSequence) -> int:
        return min(self.num_blocks_for(sequence.num_computed), len(sequence.tokens) // self.block_size)


class EvictedNameStays(KnownBad):
    """The map still names a block that was evicted and given to somebody else."""

    invariant = "I3"
    consequences = ("I1", "I6", "I7")

    def evict(self) -> int:
        block_id = self.evictable.pop(0)
        del self.key_of[block_id]
        return block_id

    def hold(self, blocks: list[int]) -> None:
        for block_id in blocks:
            if block_id in self.evictable:
                self.evictable.remove(block_id)
            self.num_holders[block_id] += 1


class DuplicateTakesTheNameOver(KnownBad):
    """The last of two equal blocks is named, while the first still thinks that it is."""

    invariant = "I3"
    consequences = ("I2", "I5", "I6", "I7")

    def name_full_blocks(self, sequence: ReferenceSequence, first: int) -> None:
        for block_idx in range(first, self.num_full_blocks(sequence)):
            key, block_id = self.key(sequence, block_idx), sequence.blocks[block_idx]
            self.block_of[key], self.key_of[block_id] = block_id, key
            sequence.num_named = block_idx + 1

    def evict(self) -> int:
        block_id = self.evictable.pop(0)
        self.block_of.pop(self.key_of.pop(block_id), None)
        return block_id


class OnlyTheFirstBlockIsFound(KnownBad):
    """Of a longer prefix, one block is hit."""

    invariant = "I3"

    def longest_hit(self, sequence: ReferenceSequence) -> int:
        return min(super().longest_hit(sequence), self.block_size)


class NewestIsEvictedFirst(KnownBad):
    """Most recently used goes first."""

    invariant = "I7"

    def evict(self) -> int:
        self.evictable.insert(0, self.evictable.pop())
        return super().evict()


class HeadIsEvictedFirst(KnownBad):
    """Blocks are let go from the head on, so the head goes first and the tails behind it can never be hit again."""

    invariant = "I7"

    def let_go(self, blocks: list[int]) -> None:
        super().let_go(list(reversed(blocks)))


class CachedGoesBeforeFree(KnownBad):
    """Cached blocks are evicted while unused ones are left."""

    invariant = "I7"

    def take(self, num_blocks: int) -> list[int]:
        if self.evictable and 0 < num_blocks <= len(self.free):
            self.free.insert(0, self.evict())
        return super().take(num_blocks)


class HitIsNotRenewed(KnownBad):
    """A block that was hit keeps its old place in the queue: first in, first out."""

    invariant = "I7"

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.age_of: dict[int, int] = {}
        self.clock = 0

    def evict(self) -> int:
        block_id = super().evict()
        self.age_of.pop(block_id, None)
        return block_id

    def let_go(self, blocks: list[int]) -> None:
        super().let_go(blocks)
        for block_id in self.evictable:
            self.clock += 1
            self.age_of.setdefault(block_id, self.clock)
        self.evictable.sort(key=self.age_of.__getitem__)


class HitIsNotHeld(KnownBad):
    """A block that was found stays evictable until somebody writes: it can be evicted before it is used."""

    invariant = "I1"

    def hold(self, blocks: list[int]) -> None:
        unheld = [block_id for block_id in blocks if block_id in self.evictable]
        super().hold(blocks)
        self.evictable += unheld[:1]


class LookupRenews(KnownBad):
    """To look is to use: a question moves blocks to the end of the queue."""

    invariant = "I8"

    def lookup(self, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        sequence = ReferenceSequence(salt, list(token_ids))
        blocks = self.cached_blocks(sequence, self.longest_hit(sequence))
        self.hold(blocks)
        self.let_go(blocks)
        return len(blocks) * self.block_size


PREFIXES: tuple[type[KnownBad], ...] = (
    NothingIsHit,
    WholePromptIsHit,
    SaltIsLeftOut,
    SaltIsAYesOrNo,
    SaltIsCutShort,
    TokensAreCutTo16Bits,
    TokensAreTakenModuloAPrime,
    KeyForgetsThePrefix,
    FourBitHash,
    NamedBeforeItIsFull,
    EvictedNameStays,
    DuplicateTakesTheNameOver,
    OnlyTheFirstBlockIsFound,
    NewestIsEvictedFirst,
    HeadIsEvictedFirst,
    CachedGoesBeforeFree,
    HitIsNotRenewed,
    HitIsNotHeld,
    LookupRenews,
)
