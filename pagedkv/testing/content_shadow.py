"""The content that blocks ought to hold: tests own it, write it slot by slot, copy it, and read it back."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from pagedkv.testing.allocator_protocol import Copies

__all__ = ["UNWRITTEN", "ContentShadow", "Histories"]

UNWRITTEN = -1
"""What a slot holds before the first write. No history has this number."""


class Histories:
    """Numbers for token histories: a token together with all before it and the salt. Equal numbers, equal histories.

    A slot that should hold token i of a sequence holds the number of its history, so that the right token behind the
    wrong prefix, or under the wrong salt, is noticed.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def root(self, salt: bytes) -> int:
        """The number of the empty history under a salt. O(1)."""
        return self._numbers.setdefault(salt, len(self._numbers))

    def walk(self, number: int, token_ids: Iterable[int]) -> list[int]:
        """One number for each token, each continuing the one before it, the first one `number`. O(tokens)."""
        numbers, walked = self._numbers, []
        for token_id in token_ids:
            number = numbers.setdefault((number, token_id), len(numbers))
            walked.append(number)
        return walked


class ContentShadow:
    """`device[b]` and `host[b]` are what the slots of block b hold."""

    __slots__ = ("block_size", "device", "host")

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.block_size = block_size
        self.device = [[UNWRITTEN] * block_size for _ in range(num_blocks)]
        self.host = [[UNWRITTEN] * block_size for _ in range(num_host_blocks)]

    def write(self, slot: int, number: int) -> None:
        """Write one token to its slot on the device. O(1)."""
        self.device[slot // self.block_size][slot % self.block_size] = number

    @staticmethod
    def copy(source: list[list[int]], target: list[list[int]], copies: Copies) -> None:
        """Copy whole blocks, in order, as a device would: what was copied before is read as it is then. O(slots)."""
        for from_block, to_block in copies:
            target[to_block] = source[from_block][:]

    def num_found(self, histories: list[int], num_tokens: int) -> int:
        """Tokens of the longest prefix of full blocks that some blocks on the device hold. O(blocks of the pool)."""
        size, found = self.block_size, 0
        while found + size <= num_tokens and histories[found : found + size] in self.device:
            found += size
        return found

    def first_difference(
        self, blocks: list[int], histories: list[int], num_tokens: int, *, on_host: bool
    ) -> int | None:
        """The first position at which reading `blocks` does not give what was written, or None. O(num_tokens)."""
        tier = self.host if on_host else self.device
        found = list(chain.from_iterable([tier[block_id] for block_id in blocks]))[:num_tokens]
        expected = histories[: len(found)]
        if found == expected:
            return None
        return next(position for position, number in enumerate(found) if number != expected[position])
