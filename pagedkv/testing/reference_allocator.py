"""A plain, correct paged allocator: what the tests expect, in the fewest words. Slow, and made to be read.

Each idea is a small method, so that the known-bad allocators of `pagedkv.testing.zoo` can break one at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from pagedkv.errors import DuplicateIdError, InvalidArgumentError, OutOfBlocksError, UnknownIdError
from pagedkv.testing.allocator_protocol import Capabilities, Copies, NewSlots

__all__ = ["ReferenceAllocator", "ReferenceSequence"]

Key = tuple[bytes, tuple[int, ...]]
"""A block's name: salt, and every token up to the block's end."""


@dataclass
class ReferenceSequence:
    """One sequence: `tokens` are known, the first `num_computed` of them have slots."""

    salt: bytes
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_named: int = 0
    host_blocks: list[int] | None = None


class ReferenceAllocator:
    """Block tables with reference counts, a prefix cache with LRU eviction, copy-on-write and swapping, in plain Python.

    >>> allocator = ReferenceAllocator(num_blocks=4, block_size=2)
    >>> allocator.open("a", [5, 6, 7], salt=b"")
    0
    >>> allocator.append("a", 3)
    NewSlots(slots=[0, 1, 2], copies=[])
    >>> allocator.open("b", [5, 6, 8], salt=b"")
    2
    """

    capabilities = Capabilities()

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_holders = [0] * num_blocks
        self.free = list(range(num_blocks))  # The first one goes out next.
        self.evictable: list[int] = []  # Nobody holds them, but they have names. The first one goes out next.
        self.free_host = list(range(num_host_blocks))
        self.block_of: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}
        self.sequences: dict[Hashable, ReferenceSequence] = {}

    # Verbs

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        """Hold the longest cached prefix."""
        self.check_is_new(sequence_id)
        if not token_ids:
            raise InvalidArgumentError("a prompt has at least one token")
        sequence = ReferenceSequence(salt, list(token_ids))
        sequence.blocks = self.cached_blocks(sequence, self.longest_hit(sequence))
        self.hold(sequence.blocks)
        sequence.num_named = len(sequence.blocks)
        sequence.num_computed = len(sequence.blocks) * self.block_size
        self.sequences[sequence_id] = sequence
        return sequence.num_computed

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """Add known tokens."""
        self.sequence(sequence_id).tokens += token_ids

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        """Copy a shared tail, take new blocks, name full ones."""
        sequence = self.on_device(sequence_id)
        self.check_range("num_tokens", num_tokens, 0, len(sequence.tokens) - sequence.num_computed)
        stop = sequence.num_computed + num_tokens
        copies_tail = num_tokens > 0 and self.needs_copy(sequence)
        new = self.take(int(copies_tail) + self.num_blocks_for(stop) - len(sequence.blocks))
        copies = [self.replace_tail(sequence, new.pop(0))] if copies_tail else []
        sequence.blocks += new
        slots = [self.slot(sequence, position) for position in range(sequence.num_computed, stop)]
        first, sequence.num_computed = sequence.num_computed // self.block_size, stop
        self.name_full_blocks(sequence, first)
        return NewSlots(slots, copies)

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        """Share every block."""
        source = self.on_device(source_id)
        self.check_is_new(sequence_id)
        self.hold(source.blocks)
        self.sequences[sequence_id] = ReferenceSequence(
            source.salt, list(source.tokens), list(source.blocks), source.num_computed, source.num_named
        )

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Drop tokens, and the blocks that hold nothing else."""
        sequence = self.on_device(sequence_id)
        self.check_range("num_tokens", num_tokens, 1, len(sequence.tokens))
        del sequence.tokens[num_tokens:]
        if num_tokens < sequence.num_computed:
            num_kept = self.num_blocks_for(num_tokens)
            dropped = sequence.blocks[num_kept:]
            del sequence.blocks[num_kept:]
            self.let_go(dropped)
            sequence.num_computed = num_tokens
            sequence.num_named = min(sequence.num_named, num_tokens // self.block_size)

    def close(self, sequence_id: Hashable) -> None:
        """Let go of every block, on either tier."""
        sequence = self.sequence(sequence_id)
        self.let_go(sequence.blocks)
        self.free_host += sequence.host_blocks or []
        del self.sequences[sequence_id]

    def swap_out(self, sequence_id: Hashable) -> Copies:
        """Copy every block to the host."""
        sequence = self.on_device(sequence_id)
        if len(sequence.blocks) > len(self.free_host):
            raise OutOfBlocksError(len(sequence.blocks), len(self.free_host))
        sequence.host_blocks = [self.free_host.pop(0) for _ in sequence.blocks]
        copies = list(zip(sequence.blocks, sequence.host_blocks, strict=True))
        self.let_go(sequence.blocks)
        sequence.blocks, sequence.num_named = [], 0
        return copies

    def swap_in(self, sequence_id: Hashable) -> Copies:
        """Take the blocks that are still cached, and copy the others."""
        sequence = self.sequence(sequence_id)
        if sequence.host_blocks is None:
            raise InvalidArgumentError(f"sequence {sequence_id!r} is not swapped out")
        hits = self.cached_blocks(sequence, sequence.num_computed)
        num_new = len(sequence.host_blocks) - len(hits)
        num_needed = num_new + sum(self.num_holders[block_id] == 0 for block_id in hits)
        if num_needed > self.num_free():
            raise OutOfBlocksError(num_needed, self.num_free())
        self.hold(hits)
        new = self.take(num_new)
        copies = list(zip(sequence.host_blocks[len(hits) :], new, strict=True))
        self.free_host += sequence.host_blocks
        sequence.blocks, sequence.num_named, sequence.host_blocks = hits + new, len(hits), None
        self.name_full_blocks(sequence, len(hits))
        return copies

    def lookup(self, token_ids: Sequence[int], *, salt: bytes = b"") -> int:
        """Count what `open` would hit."""
        sequence = ReferenceSequence(salt, list(token_ids))
        return len(self.cached_blocks(sequence, self.longest_hit(sequence))) * self.block_size

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        """A copy of the table."""
        return list(self.sequence(sequence_id).blocks)

    def num_free(self) -> int:
        """Blocks without a holder."""
        return len(self.free) + len(self.evictable)

    def num_free_host(self) -> int:
        """Host blocks without a holder."""
        return len(self.free_host)

    def state(self) -> object:
        """Everything, as plain values."""
        return (
            list(self.num_holders),
            list(self.free),
            list(self.evictable),
            list(self.free_host),
            dict(self.block_of),
            {id_: repr(sequence) for id_, sequence in self.sequences.items()},
        )

    # Blocks

    def take(self, num_blocks: int) -> list[int]:
        """Free blocks first, then evictable ones, which lose their names. All or nothing."""
        if num_blocks > self.num_free():
            raise OutOfBlocksError(num_blocks, self.num_free())
        taken = []
        for _ in range(num_blocks):
            block_id = self.free.pop(0) if self.free else self.evict()
            self.num_holders[block_id] = 1
            taken.append(block_id)
        return taken

    def evict(self) -> int:
        """The block that was let go longest ago loses its name."""
        block_id = self.evictable.pop(0)
        del self.block_of[self.key_of.pop(block_id)]
        return block_id

    def hold(self, blocks: list[int]) -> None:
        """One holder more for each."""
        for block_id in blocks:
            if self.num_holders[block_id] == 0:
                self.evictable.remove(block_id)
            self.num_holders[block_id] += 1

    def let_go(self, blocks: list[int]) -> None:
        """One holder less for each, the deepest first: a prefix is useless without its head."""
        for block_id in reversed(blocks):
            self.num_holders[block_id] -= 1
            if self.num_holders[block_id] == 0:
                (self.evictable if block_id in self.key_of else self.free).append(block_id)

    # Sequences

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.block_size)

    def slot(self, sequence: ReferenceSequence, position: int) -> int:
        """Where a token goes."""
        return sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def needs_copy(self, sequence: ReferenceSequence) -> bool:
        """Whether the partly filled last block has another holder, or a name that promises its content."""
        if sequence.num_computed % self.block_size == 0:
            return False
        tail = sequence.blocks[-1]
        return self.num_holders[tail] > 1 or tail in self.key_of

    def replace_tail(self, sequence: ReferenceSequence, block_id: int) -> tuple[int, int]:
        """Put a fresh block in the place of the last one; return what to copy where."""
        tail = sequence.blocks[-1]
        sequence.blocks[-1] = block_id
        self.let_go([tail])
        return tail, block_id

    # Prefixes

    def key(self, sequence: ReferenceSequence, block_idx: int) -> Key:
        """The name of a full block: it stands for the whole prefix."""
        return sequence.salt, tuple(sequence.tokens[: (block_idx + 1) * self.block_size])

    def longest_hit(self, sequence: ReferenceSequence) -> int:
        """At least one token must be computed, or there is nothing to sample from."""
        return len(sequence.tokens) - 1

    def cached_blocks(self, sequence: ReferenceSequence, num_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix, within so many tokens."""
        blocks: list[int] = []
        for block_idx in range(num_tokens // self.block_size):
            block_id = self.block_of.get(self.key(sequence, block_idx))
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def num_full_blocks(self, sequence: ReferenceSequence) -> int:
        """Blocks that may have a name: full and computed."""
        return sequence.num_computed // self.block_size

    def name_full_blocks(self, sequence: ReferenceSequence, first: int) -> None:
        """Name full blocks from `first` on, up to one that another sequence has named: the rest would hang from its head."""
        for block_idx in range(first, self.num_full_blocks(sequence)):
            key, block_id = self.key(sequence, block_idx), sequence.blocks[block_idx]
            if sequence.num_named != block_idx or key in self.block_of:
                return
            self.block_of[key], self.key_of[block_id] = block_id, key
            sequence.num_named = block_idx + 1

    # Arguments

    def sequence(self, sequence_id: Hashable) -> ReferenceSequence:
        """A live sequence."""
        if sequence_id not in self.sequences:
            raise UnknownIdError(f"no open sequence {sequence_id!r}")
        return self.sequences[sequence_id]

    def on_device(self, sequence_id: Hashable) -> ReferenceSequence:
        """A live sequence that is not swapped out."""
        sequence = self.sequence(sequence_id)
        if sequence.host_blocks is not None:
            raise InvalidArgumentError(f"sequence {sequence_id!r} is swapped out")
        return sequence

    def check_is_new(self, sequence_id: Hashable) -> None:
        """An id may be used again once its sequence is closed."""
        if sequence_id in self.sequences:
            raise DuplicateIdError(f"sequence {sequence_id!r} is open already")

    def check_range(self, name: str, value: int, low: int, high: int) -> None:
        """A number in low..high."""
        if not low <= value <= high:
            raise InvalidArgumentError(f"{name} must be in {low}..{high}, found {value}")
