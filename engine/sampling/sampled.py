"""What a step of sampling hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagedkv.arrays import Int32s, Int64s
from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.errors import PagedKVError

__all__ = ["BadLogitsError", "Sampled"]


class BadLogitsError(PagedKVError, ValueError):
    """Logits from which no token can be chosen: not a number, infinite, none allowed, or of a wrong shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """The tokens of one step.

    token_ids: (s,) int32; 0 stands in place of a token that could not be chosen
    logprobs:  (s,), None at the indices whose samples did not ask for them; None altogether if none did
    errors:    why no token could be chosen, by index, 0 to s - 1
    """

    token_ids: Int32s
    logprobs: Sequence[TokenLogprobs | None] | None
    errors: Mapping[int, Exception]

    def only(self, kept: Int64s) -> Sampled:
        """The tokens at these indices, ascending; an error at another index is nobody's. O(kept)."""
        logprobs = None if self.logprobs is None else [self.logprobs[idx] for idx in kept.tolist()]
        errors = {}
        if self.errors:
            places = {idx: place for place, idx in enumerate(kept.tolist())}
            errors = {places[idx]: error for idx, error in self.errors.items() if idx in places}
        return Sampled(self.token_ids[kept], logprobs, errors)
