"""A model of the memory in plain Python, which predicts what KVCacheManager does.

It shares no code with what it checks: blocks are ints in lists, a block's name is the pair of its namespace and all
tokens of its prefix, and the longest hit is found by scanning. It predicts which blocks go out, in which order, which
are evicted, which are copied, and what succeeds at exactly full capacity.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class ModelSequence:
    namespace: tuple[bytes, str | None]
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    num_named: int
    host_blocks: list[int] | None = None

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    def name(self, num_tokens: int) -> tuple[object, ...]:
        """Identity of token `num_tokens - 1` together with all before it."""
        return (self.namespace, tuple(self.tokens[:num_tokens]))


class MemoryModel:
    """What the manager promises, in the plainest words."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int, prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free_host = num_host_blocks
        self.prefix_caching = prefix_caching
        self.free = list(range(num_blocks))[::-1]  # The last one goes out next.
        self.evictable: list[int] = []  # The first one goes out next.
        self.num_holders = [0] * num_blocks
        self.block_of: dict[object, int] = {}
        self.name_of: dict[int, object] = {}
        self.sequences: dict[object, ModelSequence] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.block_size - 1) // self.block_size

    def num_available(self) -> int:
        return len(self.free) + len(self.evictable)

    def take(self, num_blocks: int) -> list[int]:
        taken = []
        for _ in range(num_blocks):
            if self.free:
                block = self.free.pop()
            else:
                block = self.evictable.pop(0)
                del self.block_of[self.name_of.pop(block)]
            self.num_holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.num_holders[block] == 0:
                self.evictable.remove(block)
            self.num_holders[block] += 1

    def let_go(self, blocks: list[int]) -> None:
        """From the end of the sequence to its start."""
        for block in reversed(blocks):
            self.num_holders[block] -= 1
            if self.num_holders[block] == 0:
                (self.evictable if block in self.name_of else self.free).append(block)

    def resident(self, sequence: ModelSequence, num_blocks: int) -> list[int]:
        blocks: list[int] = []
        while self.prefix_caching and len(blocks) < num_blocks:
            name = sequence.name((len(blocks) + 1) * self.block_size)
            if name not in self.block_of:
                break
            blocks.append(self.block_of[name])
        return blocks

    def look_up(self, namespace: tuple[bytes, str | None], tokens: list[int]) -> ModelSequence:
        sequence = ModelSequence(namespace, list(tokens), [], 0, 0)
        sequence.blocks = self.resident(sequence, (len(tokens) - 1) // self.block_size)
        self.hold(sequence.blocks)
        sequence.num_named = len(sequence.blocks)
        sequence.num_computed = len(sequence.blocks) * self.block_size
        return sequence

    def is_tail_shared(self, sequence: ModelSequence) -> bool:
        if sequence.num_computed % self.block_size == 0:
            return False
        tail = sequence.blocks[-1]
        return self.num_holders[tail] > 1 or tail in self.name_of

    def append(self, batch: list[tuple[ModelSequence, int]]) -> list[tuple[int, int]] | None:
        """Give the next tokens of each sequence slots: the copies on write first, then growth. None if blocks lack."""
        copying, num_left = [], {}
        for sequence, num_tokens in batch:
            if num_tokens and self.is_tail_shared(sequence):
                tail = sequence.blocks[-1]
                num_left.setdefault(tail, self.num_holders[tail])
                if num_left[tail] > 1 or tail in self.name_of:
                    num_left[tail] -= 1
                    copying.append(sequence)
        growth = [self.num_blocks_for(seq.num_computed + num) - len(seq.blocks) for seq, num in batch]
        if len(copying) + sum(growth) > self.num_available():
            return None
        taken = self.take(len(copying) + sum(growth))
        copies = []
        for sequence in copying:
            source, target = sequence.blocks[-1], taken.pop(0)
            sequence.blocks[-1] = target
            self.let_go([source])
            copies.append((source, target))
        for (sequence, num_tokens), num_new in zip(batch, growth, strict=True):
            sequence.blocks += taken[:num_new]
            del taken[:num_new]
            self.compute(sequence, num_tokens)
        return copies

    def compute(self, sequence: ModelSequence, num_tokens: int) -> None:
        first, sequence.num_computed = sequence.num_computed // self.block_size, sequence.num_computed + num_tokens
        self.name_from(sequence, first)

    def name_from(self, sequence: ModelSequence, first: int) -> None:
        """Name the full blocks from `first` on, while the sequence's own chain is the named one."""
        for idx in range(first, sequence.num_computed // self.block_size):
            name = sequence.name((idx + 1) * self.block_size)
            if not self.prefix_caching or sequence.num_named != idx or name in self.block_of:
                return
            self.block_of[name] = sequence.blocks[idx]
            self.name_of[sequence.blocks[idx]] = name
            sequence.num_named = idx + 1

    def fork(self, sequence: ModelSequence) -> ModelSequence:
        self.hold(sequence.blocks)
        return dataclasses.replace(sequence, tokens=list(sequence.tokens), blocks=list(sequence.blocks))

    def truncate(self, sequence: ModelSequence, num_tokens: int) -> None:
        del sequence.tokens[num_tokens:]
        if num_tokens < sequence.num_computed:
            num_kept = self.num_blocks_for(num_tokens)
            self.let_go(sequence.blocks[num_kept:])
            del sequence.blocks[num_kept:]
            sequence.num_computed = num_tokens
            sequence.num_named = min(sequence.num_named, num_tokens // self.block_size)

    def swap_out(self, sequence: ModelSequence, host_blocks: list[int]) -> None:
        self.num_free_host -= len(host_blocks)
        self.let_go(sequence.blocks)
        sequence.blocks, sequence.num_named, sequence.host_blocks = [], 0, host_blocks

    def swap_in(self, sequence: ModelSequence) -> list[tuple[int, int]] | None:
        assert sequence.host_blocks is not None
        hits = self.resident(sequence, sequence.num_computed // self.block_size)
        num_new = len(sequence.host_blocks) - len(hits)
        if num_new + sum(self.num_holders[block] == 0 for block in hits) > self.num_available():
            return None
        self.hold(hits)
        taken = self.take(num_new)
        copies = list(zip(sequence.host_blocks[len(hits) :], taken, strict=True))
        self.num_free_host += len(sequence.host_blocks)
        sequence.blocks, sequence.num_named, sequence.host_blocks = hits + taken, len(hits), None
        self.name_from(sequence, len(hits))
        return copies

    def close(self, sequence_id: object) -> None:
        sequence = self.sequences.pop(sequence_id)
        self.let_go(sequence.blocks)
        if sequence.host_blocks is not None:
            self.num_free_host += len(sequence.host_blocks)
