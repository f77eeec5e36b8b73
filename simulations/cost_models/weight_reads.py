"""Time to read the weights of the layers once, by the number of tokens in the step."""

from __future__ import annotations

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models.load import Count, Seconds
from pagedkv.simulations.cost_models.models import MixtureOfExperts

__all__ = ["WeightReads", "expected_num_experts"]

_MAX_ENTRIES = 1_000_000


def expected_num_experts(moe: MixtureOfExperts) -> list[float]:
    """Entry T: how many distinct routed experts of a layer T tokens are expected to touch, up to saturation.

    E * (1 - (1 - k / E) ** T) for k of E experts per token, if tokens choose independently and all experts are
    equally likely: a given expert is missed by one token with probability 1 - k / E. Real routers are less even and
    touch fewer. The last entry is E, to the last bit, and holds for every larger T.

    Raises `ConfigError` if that takes more than a million tokens.

    >>> expected_num_experts(
    ...     MixtureOfExperts(
    ...         num_routed_experts=4,
    ...         num_experts_per_token=2,
    ...         num_shared_experts=0,
    ...         expert_intermediate_size=1,
    ...         num_dense_layers=0,
    ...     )
    ... )[:4]
    [0.0, 2.0, 3.0, 3.5]
    """
    num_experts = moe.num_routed_experts
    miss_by_one = 1.0 - moe.num_experts_per_token / num_experts
    counts, miss = [0.0], 1.0
    while counts[-1] < num_experts:
        if len(counts) > _MAX_ENTRIES:
            raise ConfigError(f"{moe.num_experts_per_token} of {num_experts} experts per token is too sparse a choice")
        miss *= miss_by_one
        counts.append(num_experts * (1.0 - miss))
    return counts


class WeightReads:
    """Seconds to stream the layers' weights from memory once, as a table over `num_tokens`.

    A table, because a power may round differently for arrays: here scalars and arrays look up the same floats.
    Without experts it has two entries, 0 for no tokens and everything for one or more.
    """

    __slots__ = ("_array", "_last", "_table")

    def __init__(
        self, shared_s: float, *, experts_s: float = 0.0, mixture_of_experts: MixtureOfExperts | None = None
    ) -> None:
        """Take the time for what every step reads, and for one expert of *every* layer that has experts."""
        counts = [0.0, 0.0] if mixture_of_experts is None else expected_num_experts(mixture_of_experts)
        self._table = [0.0, *(shared_s + count * experts_s for count in counts[1:])]
        self._last = len(self._table) - 1
        self._array = np.array(self._table, dtype=np.float64)

    def time(self, num_tokens: Count) -> Seconds:
        """Seconds for a step of `num_tokens`. O(1), or O(k) for k steps."""
        if isinstance(num_tokens, np.ndarray):
            times: Seconds = self._array[np.minimum(num_tokens, self._last)]
            return times
        return self._table[min(num_tokens, self._last)]
