"""What an allocator's verbs answer, read strictly: an answer of a wrong kind is found where it is given."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

__all__ = ["EXPECTED", "READERS"]


def new_slots(answer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Slots, and pairs of blocks to copy first. O(n)."""
    slots, pairs = answer
    return list(map(index, slots)), copies(pairs)


def copies(answer: Any) -> list[tuple[int, int]]:
    """Pairs of blocks. O(n)."""
    return [(index(source), index(target)) for source, target in answer]


def block_ids(answer: Any) -> list[int]:
    """Blocks in order. O(n)."""
    return list(map(index, answer))


READERS: dict[str, Callable[[Any], Any]] = {
    "open": index,
    "lookup": index,
    "append": new_slots,
    "swap_out": copies,
    "swap_in": copies,
    "block_table": block_ids,
    "num_free": index,
    "num_free_host": index,
}
"""For each verb that answers, how its answer becomes plain integers; raises for an answer of any other kind."""

EXPECTED = {
    "open": "a number of tokens",
    "lookup": "a number of tokens",
    "append": "NewSlots(slots, copies)",
    "swap_out": "a sequence of (source, target)",
    "swap_in": "a sequence of (source, target)",
    "block_table": "a sequence of block ids",
    "num_free": "a number of blocks",
    "num_free_host": "a number of blocks",
}
"""What a message says that the answer should have been."""
