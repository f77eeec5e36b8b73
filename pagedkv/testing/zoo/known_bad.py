"""What all inhabitants of the zoo have in common."""

from __future__ import annotations

from typing import ClassVar

from pagedkv.testing.reference_allocator import ReferenceAllocator

__all__ = ["KnownBad"]


class KnownBad(ReferenceAllocator):
    """The reference allocator with one bug, which the docstring tells; `invariant` is what it breaks.

    `consequences` are invariants that a test may see broken first, because the bug breaks them in turn: who counts holders
    wrongly also writes into blocks that others hold.
    """

    invariant: ClassVar[str]
    consequences: ClassVar[tuple[str, ...]] = ()
