"""What the engine asks of whoever guesses the next tokens of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from pagedkv.arrays import Int32s, as_int
from pagedkv.errors import InvalidArgumentError

__all__ = ["NO_DRAFTS", "Drafter", "SampleKey", "checked_limits"]

SampleKey: TypeAlias = tuple[str, int]
"""(request id, index of the sample): what a sample is called for all its life, whatever row it sits in."""

NO_DRAFTS: Int32s = np.empty(0, np.int32)
MAX_LIMIT = 2**31 - 1


class Drafter(Protocol):
    """Guesses the next tokens of samples that it is kept informed of.

    A sample is begun with the tokens that it has, extended by every token that it gets, and ended. Its key stays the
    same while it is preempted and comes back. Guesses may be wrong, and there may be none: what the engine samples does
    not depend on them. They do depend on the tokens of the sample alone, or runs could not be repeated.
    """

    def check_target(self, vocab_size: int) -> None:
        """Raise ConfigError if it cannot guess for a model that has logits for `vocab_size` tokens."""
        ...

    def begin(self, key: SampleKey, token_ids: Sequence[int] | Int32s, *, salt: bytes = b"") -> None:
        """A sample with these known tokens, prompt and output, (n,), n >= 1, is to be guessed for; a live key starts over.

        Samples of different salts are kept apart in whatever is shared among samples. Raises InvalidArgumentError.
        """
        ...

    def extend(self, key: SampleKey, token_ids: Sequence[int] | Int32s) -> None:
        """The sample got these tokens, (n,): accepted drafts and the one that follows. Raises UnknownIdError."""
        ...

    def end(self, key: SampleKey) -> None:
        """Forget a sample and let go of all that is held for it; one that was never begun is none to forget."""
        ...

    def propose(self, keys: Sequence[SampleKey], max_drafts: Sequence[int]) -> list[Int32s]:
        """Guess for each of these samples, which are distinct, the next tokens, at most `max_drafts[i]` of them.

        Returns for each (d,) int32, possibly empty. Raises UnknownIdError, InvalidArgumentError.
        """
        ...


def checked_limits(keys: Sequence[SampleKey], max_drafts: Sequence[int], num_drafts: int) -> list[int]:
    """How many tokens to guess for each key, a drafter's own `num_drafts` at most. Raises InvalidArgumentError. O(keys)."""
    if len(keys) != len(max_drafts):
        raise InvalidArgumentError(f"{len(keys)} keys need as many max_drafts, found {len(max_drafts)}")
    if len(set(keys)) != len(keys):
        raise InvalidArgumentError("each sample can be guessed for once at a time, found a key twice")
    return [min(num_drafts, as_int("max_drafts", limit, at_least=0, at_most=MAX_LIMIT)) for limit in max_drafts]
