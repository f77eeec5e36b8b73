"""nano-vllm's BlockManager under pagedkv's tests: `pagedkv verify nano_vllm:make_allocator`, run in this folder.

The adapter adds nothing but ids. nano-vllm takes all blocks of a prompt at once, then one token at a time, which is what
`chunked_prefill=False` means; it shares blocks by their content, keeps no order of eviction that could be predicted, and leaves
checks of ids to its scheduler. A second close is passed on as a second `deallocate` of the same sequence.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence as NanoSequence

from pagedkv import OutOfBlocksError
from pagedkv.testing import Capabilities, NewSlots


class NanoVllmAllocator:
    """A BlockManager and the sequences that it has seen, open or not."""

    capabilities = Capabilities(
        salts=False,
        forking=False,
        truncating=False,
        swapping=False,
        chunked_prefill=False,
        exact_hits=False,
        eviction="any",
        checks_ids=False,
    )

    def __init__(self, num_blocks: int, block_size: int) -> None:
        NanoSequence.block_size = block_size
        self.manager = BlockManager(num_blocks, block_size)
        self.sequences: dict[Hashable, Any] = {}

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes) -> int:  # noqa: ARG002 - there are no salts
        """What the scheduler does with a waiting sequence: ask, allocate, and name the blocks that it fills."""
        sequence = NanoSequence(list(token_ids))
        num_cached_blocks = self.manager.can_allocate(sequence)
        if num_cached_blocks < 0:
            raise OutOfBlocksError(sequence.num_blocks, self.num_free())
        self.manager.allocate(sequence, num_cached_blocks)
        num_hit = int(sequence.num_cached_tokens)
        self.sequences[sequence_id] = sequence
        self._compute(sequence, len(token_ids) - num_hit)
        return num_hit

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """Sampled tokens wait here: nano-vllm learns of one at a time."""
        self.sequences[sequence_id].waiting = [*getattr(self.sequences[sequence_id], "waiting", []), *token_ids]

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:  # noqa: ARG002 - it is always one
        """One decode step."""
        sequence, size = self.sequences[sequence_id], self.manager.block_size
        num_blocks = -(-(len(sequence) + 1) // size)
        if num_blocks - len(sequence.block_table) > self.num_free():
            raise OutOfBlocksError(1, self.num_free())
        sequence.append_token(sequence.waiting.pop(0))
        self.manager.may_append(sequence)
        position = len(sequence) - 1
        self._compute(sequence, 1)
        return NewSlots([sequence.block_table[position // size] * size + position % size])

    def _compute(self, sequence: Any, num_tokens: int) -> None:
        sequence.num_scheduled_tokens = num_tokens
        self.manager.hash_blocks(sequence)
        sequence.num_cached_tokens += num_tokens

    def close(self, sequence_id: Hashable) -> None:
        """A finished or aborted sequence. It is kept, so that a second close reaches nano-vllm."""
        self.manager.deallocate(self.sequences[sequence_id])

    def lookup(self, token_ids: Sequence[int], *, salt: bytes) -> int:  # noqa: ARG002 - there are no salts
        """`can_allocate` counts the cached blocks, unless there is no room."""
        return max(0, self.manager.can_allocate(NanoSequence(list(token_ids)))) * self.manager.block_size

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        """The sequence's own table."""
        return list(self.sequences[sequence_id].block_table)

    def num_free(self) -> int:
        """Cached blocks without a holder are among the free ones."""
        return len(self.manager.free_block_ids)

    def num_free_host(self) -> int:
        """There is no host pool."""
        return 0

    def state(self) -> object:
        """Everything that the manager knows."""
        blocks = [(block.ref_count, block.hash, list(block.token_ids)) for block in self.manager.blocks]
        return blocks, list(self.manager.free_block_ids), dict(self.manager.hash_to_block_id)


def make_allocator(num_blocks: int, block_size: int, _num_host_blocks: int) -> NanoVllmAllocator:
    """The factory that `pagedkv verify` calls."""
    return NanoVllmAllocator(num_blocks, block_size)
