"""Correct allocators whose hits cannot be foretold pass, whatever they name and hit; what they get wrong is still found."""

from __future__ import annotations

import pytest

from pagedkv.testing import Capabilities, ReferenceAllocator, verify
from pagedkv.testing.zoo.prefixes import SaltIsLeftOut
from pagedkv.testing.zoo.sharing import CopiesBeyondTwoHolders

LOOSE = Capabilities(exact_hits=False)


class NamesPromptsOnly(ReferenceAllocator):
    """Answers are never hit."""

    capabilities = LOOSE

    def open(self, sequence_id, token_ids, *, salt=b""):
        num_hit = super().open(sequence_id, token_ids, salt=salt)
        self.sequences[sequence_id].num_prompt = len(token_ids)
        return num_hit

    def fork(self, source_id, sequence_id):
        super().fork(source_id, sequence_id)
        self.sequences[sequence_id].num_prompt = self.sequences[source_id].num_prompt

    def num_full_blocks(self, sequence):
        return min(sequence.num_computed, sequence.num_prompt) // self.block_size


class NamesDuplicates(ReferenceAllocator):
    """As vLLM: each full block has a name, and of equal ones the first is hit."""

    capabilities = LOOSE

    def __init__(self, num_blocks, block_size, num_host_blocks=0):
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.blocks_of = {}

    def cached_blocks(self, sequence, num_tokens):
        blocks = []
        for block_idx in range(num_tokens // self.block_size):
            equal = self.blocks_of.get(self.key(sequence, block_idx))
            if not equal:
                break
            blocks.append(equal[0])
        return blocks

    def name_full_blocks(self, sequence, first):
        for block_idx in range(self.num_full_blocks(sequence)):
            block_id = sequence.blocks[block_idx]
            if block_id not in self.key_of:
                self.key_of[block_id] = self.key(sequence, block_idx)
                self.blocks_of.setdefault(self.key_of[block_id], []).append(block_id)

    def evict(self):
        block_id = self.evictable.pop(0)
        self.blocks_of[self.key_of.pop(block_id)].remove(block_id)
        return block_id


class CopiesAllAtSwapIn(ReferenceAllocator):
    """What comes back from the host takes nothing from the cache."""

    capabilities = LOOSE
    is_swapping = False

    def swap_in(self, sequence_id):
        self.is_swapping = True
        try:
            return super().swap_in(sequence_id)
        finally:
            self.is_swapping = False

    def cached_blocks(self, sequence, num_tokens):
        return [] if self.is_swapping else super().cached_blocks(sequence, num_tokens)


class HitsNothing(ReferenceAllocator):
    """Allowed, if nothing else was promised."""

    capabilities = LOOSE

    def longest_hit(self, sequence):
        return 0


@pytest.mark.parametrize("design", [NamesPromptsOnly, NamesDuplicates, CopiesAllAtSwapIn, HitsNothing])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_correct_design_passes(design: type[ReferenceAllocator], seed: int) -> None:
    assert verify(design, num_operations=20_000, seed=seed).failure is None


@pytest.mark.parametrize(("bad", "invariant"), [(CopiesBeyondTwoHolders, "I5"), (SaltIsLeftOut, "I3")])
def test_a_bug_is_found_without_exact_hits(bad: type[ReferenceAllocator], invariant: str) -> None:
    failure = verify(type("Loose", (bad,), {"capabilities": LOOSE}), num_operations=20_000).failure

    assert failure is not None
    assert failure.invariant == invariant
