"""A model of a paged allocator in plain Python: what must happen, told before it happens.

It shares nothing with the code under test. Which block an allocator takes is its own choice: the model follows the choice,
after it has made sure that the block could be had. So it knows at any time who holds what, which names are still
resident, and how many tokens the next prompt will hit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pagedkv.errors import InvariantViolation
from pagedkv.testing.allocator_protocol import Capabilities

__all__ = ["AllocatorModel", "ModelSequence"]


class ModelSequence:
    """One live sequence: `histories` has a number for every known token, `num_computed` of them have slots."""

    __slots__ = ("blocks", "histories", "host_blocks", "num_computed", "num_named", "salt", "tokens", "was_swapped")

    def __init__(self, salt: bytes, tokens: list[int], histories: list[int]) -> None:
        self.salt = salt
        self.tokens = tokens
        self.histories = histories
        self.num_computed = 0
        self.num_named = 0
        self.blocks: list[int] = []
        self.host_blocks: list[int] | None = None
        self.was_swapped = False

    @property
    def num_pending(self) -> int:
        """Known tokens without a slot."""
        return len(self.histories) - self.num_computed


class AllocatorModel:
    """Holders, names and the order of eviction of both pools, recounted from what was asked and what was answered.

    Names, and with them the order of eviction, are followed only where the allocator promises exact hits.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int, capabilities: Capabilities) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.capabilities = capabilities
        self.sequences: dict[Hashable, ModelSequence] = {}
        self.num_holders = [0] * num_blocks
        self.num_held = 0
        self.host_held: set[int] = set()
        # A name is the history of a block's last token. Evictable blocks stand in the order in which they were let go.
        self.block_of: dict[int, int] = {}
        self.name_of: dict[int, int] = {}
        self.parent_of: dict[int, int] = {}
        self.evictable: dict[int, None] = {}
        # Where hits are not exact, which blocks have names is the allocator's secret: some of those that have been full.
        self.once_full: set[int] = set()

    @property
    def num_free(self) -> int:
        """Device blocks that nobody holds. O(1)."""
        return self.num_blocks - self.num_held

    @property
    def num_free_host(self) -> int:
        """Host blocks that nobody holds. O(1)."""
        return self.num_host_blocks - len(self.host_held)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens. O(1)."""
        return (num_tokens + self.block_size - 1) // self.block_size

    def resident(self, histories: list[int], num_tokens: int) -> list[int]:
        """Blocks of the longest prefix of full blocks, within `num_tokens`, that are named. O(blocks)."""
        blocks: list[int] = []
        size = self.block_size
        if self.capabilities.prefix_caching:
            for stop in range(size, num_tokens + 1, size):
                block_id = self.block_of.get(histories[stop - 1])
                if block_id is None:
                    break
                blocks.append(block_id)
        return blocks

    def longest_hit(self, histories: list[int]) -> int:
        """Tokens that a hit may cover at most. O(1)."""
        return len(histories) - 1 if self.capabilities.recomputes_last_token else len(histories)

    def must_copy(self, sequence: ModelSequence) -> bool:
        """Whether the next token would change a block that another holds, or whose name promises its content. O(1)."""
        if sequence.num_computed % self.block_size == 0:
            return False
        tail = sequence.blocks[-1]
        return self.num_holders[tail] > 1 or tail in self.name_of

    def may_copy(self, sequence: ModelSequence) -> bool:
        """Whether the next token may change a block that the allocator has named, as far as the model can know. O(1)."""
        return self.must_copy(sequence) or (
            sequence.num_computed % self.block_size > 0 and sequence.blocks[-1] in self.once_full
        )

    def num_needed(self, sequence: ModelSequence, num_tokens: int) -> int:
        """Blocks that appending takes, copies included that must be made. O(1)."""
        growth = self.num_blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        return growth + (num_tokens > 0 and self.must_copy(sequence))

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each block. O(n). Raises InvariantViolation, I1, for blocks that do not exist."""
        for block_id in blocks:
            self._check_exists(block_id)
            if self.num_holders[block_id] == 0:
                self.num_held += 1
                self.evictable.pop(block_id, None)
            self.num_holders[block_id] += 1

    def let_go(self, blocks: Sequence[int]) -> None:
        """One holder less for each block, the deepest first. O(n)."""
        for block_id in reversed(blocks):
            self.num_holders[block_id] -= 1
            if self.num_holders[block_id] == 0:
                self.num_held -= 1
                if block_id in self.name_of:
                    self.evictable[block_id] = None

    def take(self, blocks: Sequence[int]) -> None:
        """Follow the allocator's choice of new blocks, once it is a choice that it had. O(n).

        Raises InvariantViolation: I1 for blocks that somebody holds, I7 for cached blocks that had to stay.
        """
        has_twins = len(set(blocks)) < len(blocks)
        for idx, block_id in enumerate(blocks):
            self._check_exists(block_id)
            if self.num_holders[block_id] or (has_twins and block_id in blocks[:idx]):
                raise InvariantViolation(
                    "I1", f"block {block_id} was handed out, {self.holders_of(block_id)} held it: expected a free one"
                )
        victims = [block_id for block_id in blocks if block_id in self.evictable]
        if victims:
            self._check_victims(victims, num_taken=len(blocks))
        for block_id in victims:
            self.forget(block_id)
        for block_id in blocks:
            self.num_holders[block_id] = 1
        self.num_held += len(blocks)
        if self.once_full:
            self.once_full.difference_update(blocks)

    def _check_exists(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise InvariantViolation("I1", f"block {block_id} was handed out, there are 0..{self.num_blocks - 1}")

    def _check_victims(self, victims: list[int], num_taken: int) -> None:
        eviction = self.capabilities.eviction
        if eviction == "lru":
            num_unnamed = self.num_free - len(self.evictable)
            num_expected = max(0, num_taken - num_unnamed)
            expected = list(self.evictable)[:num_expected]
            if sorted(victims) != sorted(expected):
                raise InvariantViolation(
                    "I7",
                    f"cached blocks {sorted(victims)} were evicted, expected {sorted(expected)} by least recent use",
                )
        elif eviction == "leaf":
            for block_id in self.name_of:
                parent = self.parent_of[block_id]
                if parent in victims and block_id not in victims:
                    raise InvariantViolation(
                        "I7",
                        f"block {parent} was evicted before block {block_id}, which continues it and is still cached",
                    )

    def forget(self, block_id: int) -> None:
        """The block's content is no longer what its name says. O(1)."""
        name = self.name_of.pop(block_id, None)
        if name is not None:
            del self.block_of[name]
            del self.parent_of[block_id]
            self.evictable.pop(block_id, None)

    def name_filled(self, sequence: ModelSequence, first: int) -> None:
        """Name the full blocks from `first` on, while the sequence's own chain is the named one. O(blocks)."""
        if not self.capabilities.prefix_caching:
            return
        if not self.capabilities.exact_hits:
            self.once_full.update(sequence.blocks[first : sequence.num_computed // self.block_size])
            return
        for idx in range(first, sequence.num_computed // self.block_size):
            name, block_id = sequence.histories[(idx + 1) * self.block_size - 1], sequence.blocks[idx]
            if sequence.num_named != idx or name in self.block_of:
                return
            self.forget(block_id)
            self.block_of[name] = block_id
            self.name_of[block_id] = name
            self.parent_of[block_id] = sequence.blocks[idx - 1] if idx else -1
            sequence.num_named = idx + 1

    def holders_of(self, block_id: int) -> list[Hashable]:
        """Ids of the sequences whose tables name the block. O(blocks)."""
        return [id_ for id_, sequence in self.sequences.items() if block_id in sequence.blocks]
