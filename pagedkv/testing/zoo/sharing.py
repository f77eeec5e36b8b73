"""Bugs in sharing blocks and in copy-on-write."""

from __future__ import annotations

from collections.abc import Hashable

from pagedkv.testing.reference_allocator import ReferenceSequence
from pagedkv.testing.zoo.known_bad import KnownBad

__all__ = ["SHARING"]


class ForkHoldsNothing(KnownBad):
    """The child's table names blocks of which it is not counted as a holder."""

    invariant = "I1"
    consequences = ("I5",)

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        super().fork(source_id, sequence_id)
        for block_id in self.sequence(sequence_id).blocks:
            self.num_holders[block_id] = max(1, self.num_holders[block_id] - 1)

    def let_go(self, blocks: list[int]) -> None:
        super().let_go([block_id for block_id in blocks if self.num_holders[block_id]])


class ForkHoldsTheWrongBlock(KnownBad):
    """The reference for the last block is taken on the first."""

    invariant = "I1"
    consequences = ("I5",)

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        super().fork(source_id, sequence_id)
        blocks = self.sequence(sequence_id).blocks
        if len(blocks) > 1:
            self.num_holders[blocks[-1]] -= 1
            self.num_holders[blocks[0]] += 1


class ForkWritesInPlace(KnownBad):
    """There is no copy-on-write: both halves of a fork write into the same block."""

    invariant = "I5"

    def needs_copy(self, sequence: ReferenceSequence) -> bool:  # noqa: ARG002 - that is the bug
        return False


class CopiesBeyondTwoHolders(KnownBad):
    """`> 1` became `> 2`: a block that exactly two share is written in place."""

    invariant = "I5"

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        if not super().needs_copy(sequence):
            return False
        tail = sequence.blocks[-1]
        return self.num_holders[tail] > 2 or tail in self.key_of


class CopiesItsOwnBlock(KnownBad):
    """`> 1` became `>= 1`: a block is copied although nobody else has it."""

    invariant = "I5"

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        is_in_block = sequence.num_computed % self.block_size > 0
        has_room = self.num_free() > self.num_blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        return super().needs_copy(sequence) or (is_in_block and has_room)


class WritesIntoCachedBlocks(KnownBad):
    """After a truncation into a cached block, the block is written although its name promises other content."""

    invariant = "I5"

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        return super().needs_copy(sequence) and self.num_holders[sequence.blocks[-1]] > 1


class CopiesBackwards(KnownBad):
    """The copy goes from the fresh block to the shared one."""

    invariant = "I5"

    def replace_tail(self, sequence: ReferenceSequence, block_id: int) -> tuple[int, int]:
        source, target = super().replace_tail(sequence, block_id)
        return target, source


class CopiedSourceStaysHeld(KnownBad):
    """Whoever copies a block goes on holding the old one."""

    invariant = "I9"
    consequences = ("I2",)

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        tail = sequence.blocks[-1:]
        num_tables = sum(tail == other.blocks[-1:] for other in self.sequences.values())
        return super().needs_copy(sequence) and (num_tables > 1 or tail[0] in self.key_of)

    def replace_tail(self, sequence: ReferenceSequence, block_id: int) -> tuple[int, int]:
        tail = sequence.blocks[-1]
        if self.num_holders[tail] == 1:
            return super().replace_tail(sequence, block_id)
        sequence.blocks[-1] = block_id
        return tail, block_id


SHARING: tuple[type[KnownBad], ...] = (
    ForkHoldsNothing,
    ForkHoldsTheWrongBlock,
    ForkWritesInPlace,
    CopiesBeyondTwoHolders,
    CopiesItsOwnBlock,
    WritesIntoCachedBlocks,
    CopiesBackwards,
    CopiedSourceStaysHeld,
)
