"""Bugs in what is left behind by a call that fails."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pagedkv.errors import OutOfBlocksError
from pagedkv.testing.allocator_protocol import NewSlots
from pagedkv.testing.zoo.known_bad import KnownBad

__all__ = ["ATOMICITY"]


class ShortAppendTakesWhatThereIs(KnownBad):
    """Blocks are taken one by one; those taken before the shortage stay held by nobody."""

    invariant = "I8"

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_free():
            for block_id in self.free:
                self.num_holders[block_id] = 1
            self.free.clear()
            raise OutOfBlocksError(num_blocks, 0)
        return super().take(num_blocks)


class ShortAppendEvicts(KnownBad):
    """Room is made before it is known whether it suffices."""

    invariant = "I8"

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_free() and self.evictable:
            self.free.append(self.evict())
        return super().take(num_blocks)


class ShortAppendCountsTheTokens(KnownBad):
    """Tokens count as computed before they have slots."""

    invariant = "I8"

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        sequence = self.sequence(sequence_id)
        num_computed = sequence.num_computed
        try:
            return super().append(sequence_id, num_tokens)
        except OutOfBlocksError:
            sequence.num_computed = min(num_computed + 1, len(sequence.tokens))
            raise


class DuplicateIdOverwrites(KnownBad):
    """A prompt with the id of a live sequence takes its place."""

    invariant = "I8"

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        if sequence_id in self.sequences and token_ids:
            self.close(sequence_id)
        return super().open(sequence_id, token_ids, salt=salt)


class ForkOntoALiveId(KnownBad):
    """A fork under the id of a live sequence takes its place."""

    invariant = "I8"

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        if sequence_id in self.sequences and source_id in self.sequences and source_id != sequence_id:
            self.close(sequence_id)
        super().fork(source_id, sequence_id)


class UnknownIdIsAnAttributeError(KnownBad):
    """An id that was never opened ends in an error that means nothing to the caller."""

    invariant = "I8"

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        sequence = self.sequences.get(sequence_id)
        sequence.tokens.extend(token_ids)  # type: ignore[union-attr]


class NegativeAppend(KnownBad):
    """A negative number of tokens passes for nothing to do."""

    invariant = "I8"

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        self.on_device(sequence_id)
        return super().append(sequence_id, max(0, num_tokens))


class AppendBeyondTheKnown(KnownBad):
    """More tokens than are known are cut down without a word."""

    invariant = "I8"

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        sequence = self.on_device(sequence_id)
        return super().append(sequence_id, min(num_tokens, len(sequence.tokens) - sequence.num_computed))


class RefusedForkHolds(KnownBad):
    """Blocks are held before the child's id is looked at."""

    invariant = "I8"

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        if source_id in self.sequences and sequence_id in self.sequences:
            self.hold(self.sequences[source_id].blocks)
        super().fork(source_id, sequence_id)


class KeepsTheCallersList(KnownBad):
    """The prompt is kept as it was handed over, so that what is known later is added to the caller's own list."""

    invariant = "I8"

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        num_hit = super().open(sequence_id, token_ids, salt=salt)
        if isinstance(token_ids, list):
            self.sequences[sequence_id].tokens = token_ids
        return num_hit


ATOMICITY: tuple[type[KnownBad], ...] = (
    ShortAppendTakesWhatThereIs,
    ShortAppendEvicts,
    ShortAppendCountsTheTokens,
    DuplicateIdOverwrites,
    ForkOntoALiveId,
    UnknownIdIsAnAttributeError,
    NegativeAppend,
    AppendBeyondTheKnown,
    RefusedForkHolds,
    KeepsTheCallersList,
)
