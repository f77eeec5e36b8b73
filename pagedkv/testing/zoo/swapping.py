"""Bugs in moving sequences between device and host."""

from __future__ import annotations

from collections.abc import Hashable

from pagedkv.errors import OutOfBlocksError
from pagedkv.testing.allocator_protocol import Copies
from pagedkv.testing.zoo.known_bad import KnownBad

__all__ = ["SWAPPING"]


class SwapsInReversed(KnownBad):
    """Host blocks come back in the opposite order."""

    invariant = "I6"

    def swap_in(self, sequence_id: Hashable) -> Copies:
        copies = super().swap_in(sequence_id)
        sources, targets = [source for source, _ in copies], [target for _, target in copies]
        return list(zip(reversed(sources), targets, strict=True))


class SwapsInFromTheHead(KnownBad):
    """Where the first blocks are still cached, the host's first blocks are copied instead of its last ones."""

    invariant = "I6"

    def swap_in(self, sequence_id: Hashable) -> Copies:
        host_blocks = list(self.sequence(sequence_id).host_blocks or [])
        copies = super().swap_in(sequence_id)
        return [(host_blocks[idx], target) for idx, (_, target) in enumerate(copies)]


class HostBlockIsGivenTwice(KnownBad):
    """Two blocks of one swap go to the same host block."""

    invariant = "I6"

    def swap_out(self, sequence_id: Hashable) -> Copies:
        copies = list(super().swap_out(sequence_id))
        if len(copies) > 1:
            copies[-1] = (copies[-1][0], copies[0][1])
        return copies


class FailedSwapOutKeepsHostBlocks(KnownBad):
    """Host blocks are taken one by one, and those taken stay gone when there are too few."""

    invariant = "I6"

    def swap_out(self, sequence_id: Hashable) -> Copies:
        num_blocks = len(self.on_device(sequence_id).blocks)
        if num_blocks > len(self.free_host):
            num_free = len(self.free_host)
            self.free_host.clear()
            raise OutOfBlocksError(num_blocks, num_free)
        return super().swap_out(sequence_id)


class FailedSwapInDropsTheHostCopy(KnownBad):
    """The host blocks are given back before it is clear that the device has room."""

    invariant = "I6"

    def swap_in(self, sequence_id: Hashable) -> Copies:
        sequence = self.sequence(sequence_id)
        host_blocks = list(sequence.host_blocks or [])
        try:
            return super().swap_in(sequence_id)
        except OutOfBlocksError:
            self.free_host += host_blocks
            raise


class HostBlocksStayAfterSwapIn(KnownBad):
    """What came back from the host is never given back there."""

    invariant = "I2"

    def swap_in(self, sequence_id: Hashable) -> Copies:
        num_free = len(self.free_host)
        copies = super().swap_in(sequence_id)
        del self.free_host[num_free:]
        return copies


class ClosingForgetsTheHost(KnownBad):
    """A sequence that is closed while it is swapped out leaves its host blocks behind."""

    invariant = "I9"

    def close(self, sequence_id: Hashable) -> None:
        self.sequence(sequence_id).host_blocks = None
        super().close(sequence_id)


class EvictsItsOwnHits(KnownBad):
    """Blocks of a swap in that are still cached are found, but not held before room is made for the others."""

    invariant = "I7"

    def swap_in(self, sequence_id: Hashable) -> Copies:
        sequence = self.sequence(sequence_id)
        hits = self.cached_blocks(sequence, sequence.num_computed)
        num_new = len(sequence.host_blocks or []) - len(hits)
        num_needed = num_new + sum(self.num_holders[block_id] == 0 for block_id in hits)
        if sequence.host_blocks is None or num_needed > self.num_free():
            return super().swap_in(sequence_id)
        new = self.take(num_new)
        for block_id in hits:
            if block_id in self.evictable:
                self.evictable.remove(block_id)
            self.num_holders[block_id] += 1
        copies = list(zip(sequence.host_blocks[len(hits) :], new, strict=True))
        self.free_host += sequence.host_blocks
        sequence.blocks, sequence.num_named, sequence.host_blocks = hits + new, len(hits), None
        self.name_full_blocks(sequence, len(hits))
        return copies


SWAPPING: tuple[type[KnownBad], ...] = (
    SwapsInReversed,
    SwapsInFromTheHead,
    HostBlockIsGivenTwice,
    FailedSwapOutKeepsHostBlocks,
    FailedSwapInDropsTheHostCopy,
    HostBlocksStayAfterSwapIn,
    ClosingForgetsTheHost,
    EvictsItsOwnHits,
)
