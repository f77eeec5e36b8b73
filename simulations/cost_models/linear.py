"""Step time as a line: a base, and so much for each token, row and block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models.checks import require_non_negative
from pagedkv.simulations.cost_models.load import Seconds, StepLoad

__all__ = ["LinearCostModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCostModel:
    """The sum of constant costs: y = k * x + b in each of the aggregates of a step. For tests, fits and baselines.

    step_time = base_s + per_token_s * num_tokens + per_context_token_s * num_context_tokens + per_row_s * num_rows
                + per_attention_pair_s * num_attention_pairs + per_copied_block_s * num_copied_blocks
                + per_swapped_block_s * (num_swapped_in_blocks + num_swapped_out_blocks)

    All in seconds, finite and at least 0. Raises `ConfigError` otherwise, and if `base_s`, `per_token_s` and
    `per_row_s` are all 0: a step would then take no time, and the clock would stand still.

    >>> model = LinearCostModel(base_s=0.5, per_token_s=0.25)
    >>> model.step_time(
    ...     StepLoad(num_rows=1, num_tokens=2, num_sampled=1, num_context_tokens=2, num_attention_pairs=3)
    ... )
    1.0
    """

    base_s: float
    per_token_s: float
    per_context_token_s: float = 0.0
    per_row_s: float = 0.0
    per_attention_pair_s: float = 0.0
    per_copied_block_s: float = 0.0
    per_swapped_block_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require_non_negative(name, value)
        if not (self.base_s or self.per_token_s or self.per_row_s):
            raise ConfigError("one of base_s, per_token_s, per_row_s must be above 0, or a step takes no time")

    @property
    def name(self) -> str:
        """Always "linear"."""
        return "linear"

    @property
    def prefill_s_per_token(self) -> float:
        """Marginal seconds for each recomputed token: `per_token_s`. Context reads are left out."""
        return self.per_token_s

    @property
    def swap_s_per_block(self) -> float:
        """Seconds for each block moved in one direction: `per_swapped_block_s`."""
        return self.per_swapped_block_s

    def step_time(self, load: StepLoad) -> Seconds:
        """Seconds for the step; see the class for the formula. O(1), or O(k) for k steps."""
        num_rows, num_tokens, _, num_context_tokens, num_pairs, num_copied, num_in, num_out = load
        return cast(
            "Seconds",
            self.base_s
            + num_tokens * self.per_token_s
            + num_context_tokens * self.per_context_token_s
            + num_rows * self.per_row_s
            + num_pairs * self.per_attention_pair_s
            + num_copied * self.per_copied_block_s
            + (num_in + num_out) * self.per_swapped_block_s,
        )

    def describe(self) -> dict[str, Any]:
        """The kind and the seven constants."""
        return {"kind": "linear", "name": self.name, **asdict(self)}
