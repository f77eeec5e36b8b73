"""Allocators with one planted bug each: the proof that the tests find what they are for.

Every inhabitant is the reference allocator but for a line or two, says what is wrong with it, and names the invariant that
it breaks. Run the tests against one to see how they fail: `pagedkv verify pagedkv.testing.zoo.sharing:ForkHoldsNothing`.
"""

from pagedkv.testing.zoo.atomicity import ATOMICITY
from pagedkv.testing.zoo.blocks import BLOCKS
from pagedkv.testing.zoo.known_bad import KnownBad
from pagedkv.testing.zoo.prefixes import PREFIXES
from pagedkv.testing.zoo.sharing import SHARING
from pagedkv.testing.zoo.swapping import SWAPPING

__all__ = ["KNOWN_BAD", "KnownBad"]

KNOWN_BAD: tuple[type[KnownBad], ...] = (*BLOCKS, *PREFIXES, *SHARING, *SWAPPING, *ATOMICITY)
