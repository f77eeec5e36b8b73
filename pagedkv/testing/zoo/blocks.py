"""Bugs in counting, taking and freeing blocks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import SystemRandom
from typing import ClassVar

from pagedkv.errors import OutOfBlocksError
from pagedkv.testing.reference_allocator import ReferenceSequence
from pagedkv.testing.zoo.known_bad import KnownBad

__all__ = ["BLOCKS"]


class ExactFitIsRefused(KnownBad):
    """`>` became `>=`: the last free block is never handed out."""

    invariant = "I2"

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks and num_blocks >= self.num_free():
            raise OutOfBlocksError(num_blocks, self.num_free())
        return super().take(num_blocks)


class HandsOutABlockTwice(KnownBad):
    """A block that is taken stays in the free list when it is the only one there."""

    invariant = "I1"

    def take(self, num_blocks: int) -> list[int]:
        only = list(self.free) if len(self.free) == 1 else []
        taken = super().take(num_blocks)
        self.free += [block_id for block_id in only if block_id in taken]
        return taken


class TablesOfEightBits(KnownBad):
    """Block ids in tables are cut to a byte: fine, as long as the pool has no more than 256 blocks."""

    invariant = "I1"
    consequences = ("I3", "I4")

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        return [block_id % 256 for block_id in super().block_table(sequence_id)]


class TruncatingFreesThePartialBlock(KnownBad):
    """Rounds the wrong way: a truncation into the middle of a block frees that block, too."""

    invariant = "I1"

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        super().truncate(sequence_id, num_tokens)
        sequence = self.sequence(sequence_id)
        if sequence.num_computed % self.block_size and len(sequence.blocks) > 1:
            self.let_go([sequence.blocks.pop()])


class TruncatingFreesNothing(KnownBad):
    """Dropped tokens leave the table, their blocks stay held."""

    invariant = "I2"

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        blocks = list(self.on_device(sequence_id).blocks)
        super().truncate(sequence_id, num_tokens)
        dropped = blocks[len(self.sequence(sequence_id).blocks) :]
        for block_id in dropped:
            for unheld in (self.free, self.evictable):
                if block_id in unheld:
                    unheld.remove(block_id)
                    self.num_holders[block_id] = 1


class FreeListGrows(KnownBad):
    """Truncating to a block's end lists the dropped blocks as free once more."""

    invariant = "I2"

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        num_free = len(self.free)
        super().truncate(sequence_id, num_tokens)
        if num_tokens % self.block_size == 0:
            self.free += self.free[num_free:]


class OwnTableIsCompacted(KnownBad):
    """Closing a sequence tidies up: another sequence's last block is moved to the lowest free one, behind its back."""

    invariant = "I1"

    def close(self, sequence_id: Hashable) -> None:
        super().close(sequence_id)
        for sequence in self.sequences.values():
            movable = [block_id for block_id in sequence.blocks if self.num_holders[block_id] == 1]
            if movable and self.free and movable[-1] not in self.key_of and min(self.free) < movable[-1]:
                lowest = min(self.free)
                self.free[self.free.index(lowest)] = movable[-1]
                self.num_holders[lowest], self.num_holders[movable[-1]] = 1, 0
                sequence.blocks[sequence.blocks.index(movable[-1])] = lowest
                return


class ClosingForgetsTheLastBlock(KnownBad):
    """The partly filled last block is not given back."""

    invariant = "I9"
    consequences = ("I2",)

    def close(self, sequence_id: Hashable) -> None:
        sequence = self.sequence(sequence_id)
        if sequence.num_computed % self.block_size:
            sequence.blocks.pop()
        super().close(sequence_id)


class ClosingTwiceIsSilent(KnownBad):
    """A second close of the same sequence is taken for a harmless repetition."""

    invariant = "I9"

    def close(self, sequence_id: Hashable) -> None:
        if sequence_id in self.sequences:
            super().close(sequence_id)


class ClosingFreesTwice(KnownBad):
    """The last block enters the free list on two exit paths."""

    invariant = "I9"

    def close(self, sequence_id: Hashable) -> None:
        blocks = list(self.sequence(sequence_id).blocks)
        super().close(sequence_id)
        if blocks and blocks[-1] in self.free:
            self.free.append(blocks[-1])


class AbortInPrefillLeaks(KnownBad):
    """A sequence that is closed before its prompt is computed keeps what it had."""

    invariant = "I9"

    def close(self, sequence_id: Hashable) -> None:
        sequence = self.sequence(sequence_id)
        if 0 < sequence.num_computed < len(sequence.tokens):
            sequence.blocks = []
        super().close(sequence_id)


class ClosedIdIsNeverFree(KnownBad):
    """The id of a closed sequence is kept, so that it cannot be opened again."""

    invariant = "I10"

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.seen: set[Hashable] = set()

    def check_is_new(self, sequence_id: Hashable) -> None:
        if sequence_id in self.seen:
            raise ValueError(f"sequence {sequence_id!r} was there before")
        super().check_is_new(sequence_id)

    def close(self, sequence_id: Hashable) -> None:
        super().close(sequence_id)
        self.seen.add(sequence_id)


class ClosedTableStays(KnownBad):
    """A closed sequence can still be read through its old table."""

    invariant = "I10"

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.tables: dict[Hashable, list[int]] = {}

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        if sequence_id in self.sequences:
            self.tables[sequence_id] = list(super().block_table(sequence_id))
        return self.tables.get(sequence_id, [])


class MoreThanThePoolIsCutShort(KnownBad):
    """A sequence that can never fit gets what there is, and no error."""

    invariant = "I12"

    def take(self, num_blocks: int) -> list[int]:
        return super().take(self.num_free() if num_blocks > self.num_blocks else num_blocks)


class MoreThanThePoolIsAnIndexError(KnownBad):
    """Only shortages that could pass are checked for; what can never fit runs off the end of the free list."""

    invariant = "I12"

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_blocks:
            raise IndexError("pop from empty list")
        return super().take(num_blocks)


class TakesARandomBlock(KnownBad):
    """Which free block goes out is decided by a generator that nobody seeds."""

    invariant = "I14"

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks <= self.num_free():
            SystemRandom().shuffle(self.free)
        return super().take(num_blocks)


class RemembersOtherPools(KnownBad):
    """The first free block depends on how many pools the process has made before."""

    invariant = "I14"
    num_made: ClassVar[int] = 0

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        RemembersOtherPools.num_made += 1
        if RemembersOtherPools.num_made % 2:
            self.free.reverse()


class SlotsAreOffByOne(KnownBad):
    """Slots of a block are counted from 1 where a block holds more than one token."""

    invariant = "I4"

    def slot(self, sequence: ReferenceSequence, position: int) -> int:
        block_id = sequence.blocks[position // self.block_size]
        return block_id * self.block_size + (position + 1) % self.block_size if self.block_size > 1 else block_id


class SlotsGoToTheFirstBlock(KnownBad):
    """Tokens behind a block's end are written to the start of the first block that the call touched."""

    invariant = "I4"

    def slot(self, sequence: ReferenceSequence, position: int) -> int:
        block_idx = min(position, sequence.num_computed) // self.block_size
        return sequence.blocks[block_idx] * self.block_size + position % self.block_size


BLOCKS: tuple[type[KnownBad], ...] = (
    ExactFitIsRefused,
    HandsOutABlockTwice,
    TablesOfEightBits,
    TruncatingFreesThePartialBlock,
    TruncatingFreesNothing,
    FreeListGrows,
    OwnTableIsCompacted,
    ClosingForgetsTheLastBlock,
    ClosingTwiceIsSilent,
    ClosingFreesTwice,
    AbortInPrefillLeaks,
    ClosedIdIsNeverFree,
    ClosedTableStays,
    MoreThanThePoolIsCutShort,
    MoreThanThePoolIsAnIndexError,
    TakesARandomBlock,
    RemembersOtherPools,
    SlotsAreOffByOne,
    SlotsGoToTheFirstBlock,
)
