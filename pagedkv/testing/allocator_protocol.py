"""What an allocator must answer to be tested: a dozen verbs, and a list of what it can do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from pagedkv.errors import OutOfBlocksError

__all__ = ["AllocatorProtocol", "Capabilities", "Copies", "MakeAllocator", "NewSlots"]

Copies = Sequence[tuple[int, int]]
"""Whole blocks to copy, `(source, target)`, in this order."""


class NewSlots(NamedTuple):
    """Where new tokens go, and what must be copied before they are written.

    slots:  one for each token, in order; slot = block_id * block_size + offset
    copies: blocks to copy on the device first (copy-on-write)
    """

    slots: Sequence[int]
    copies: Copies = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an allocator can do and promises. What it cannot do is left out of the tests; the defaults are the strictest.

    `prefix_caching`: full blocks can be hit by later prompts; `salts`: `open` and `lookup` keep tenants apart;
    `forking`, `truncating`, `swapping`: the verbs of that name exist.
    `chunked_prefill`: `open` takes no block beyond the hit, and `append` any number of known tokens. Without it, `open`
    takes all blocks of the prompt, and `append` one token at a time.
    `recomputes_last_token`: a hit leaves at least one token of the prompt to compute.
    `exact_hits`: hits are predicted to the token: whatever was computed and not yet evicted is hit, and of two equal
    blocks the first computed is shared. Without it, a hit must only be sound: its blocks hold the prompt's content; any full
    block may have a name or none, and be copied before it is changed or not; and no order of eviction is held.
    `eviction`: "lru" takes free blocks first, then cached ones, longest unused first and the deepest of a sequence
    before the others; "leaf" any cached block that no cached block continues; "any" promises nothing.
    `checks_ids`: unknown and duplicate ids and numbers out of range are refused with an error in `mistakes`. A second
    `close` is tried even without it.
    `shortage`: the errors that mean "not enough blocks now"; `mistakes`: those that mean "you may not ask for that".
    """

    prefix_caching: bool = True
    salts: bool = True
    forking: bool = True
    truncating: bool = True
    swapping: bool = True
    chunked_prefill: bool = True
    recomputes_last_token: bool = True
    exact_hits: bool = True
    eviction: Literal["lru", "leaf", "any"] = "lru"
    checks_ids: bool = True
    shortage: tuple[type[Exception], ...] = (OutOfBlocksError,)
    mistakes: tuple[type[Exception], ...] = (ValueError, KeyError)


class AllocatorProtocol(Protocol):
    """A paged allocator as its tests see it: integers only, no tensors.

    Tests own the content: they write to the slots that `append` hands out, carry out the copies, and read back through
    `block_table`. Every verb does all of its work, or raises and changes nothing. Verbs that `capabilities` denies may be
    missing. Two optional methods are used where they exist: `check()`, the allocator's own recount, which raises when
    something is wrong; `state()`, everything it knows as plain values that compare with `==`, for tests of atomicity.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the allocator can do."""

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes) -> int:
        """Begin a sequence on its longest cached prefix; return how many tokens that covers.

        Raises a mistake for an id that is open and for an empty prompt.
        """

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """Make more tokens known at the end of a sequence. Takes no blocks."""

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        """Give the next known tokens their slots; 0 tokens take nothing and succeed.

        Raises a shortage, or a mistake beyond the known tokens.
        """

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        """Begin a sequence that shares all blocks of another. Whoever writes into a shared block first copies it."""

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Drop every token from `num_tokens` >= 1 on, and the blocks that only they needed."""

    def close(self, sequence_id: Hashable) -> None:
        """End a sequence, swapped out or not. A second time is a mistake."""

    def swap_out(self, sequence_id: Hashable) -> Copies:
        """Move a sequence to host blocks; return the copies, device to host. Raises a shortage."""

    def swap_in(self, sequence_id: Hashable) -> Copies:
        """Bring it back; return the copies, host to device, without blocks that are still cached. Raises a shortage."""

    def lookup(self, token_ids: Sequence[int], *, salt: bytes) -> int:
        """How many tokens `open` would hit. Changes nothing, not even the order of eviction."""

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        """The sequence's blocks on the device, in order; none while it is swapped out."""

    def num_free(self) -> int:
        """Device blocks that could be had now: free and evictable."""

    def num_free_host(self) -> int:
        """Host blocks that could be had now."""


class MakeAllocator(Protocol):
    """Builds an empty allocator: the only thing that users must supply."""

    def __call__(self, num_blocks: int, block_size: int, num_host_blocks: int, /) -> AllocatorProtocol:
        """`num_host_blocks` may be ignored by allocators that do not swap."""
