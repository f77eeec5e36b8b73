"""What a preemption does with the K/V computed so far: forget it, or move it to the host."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pagedkv.arrays import shown
from pagedkv.errors import ConfigError

__all__ = ["Cheaper", "PreemptionMode", "PreemptionPolicy", "Recompute", "Swap"]


class PreemptionMode(StrEnum):
    """How a preempted request comes back."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


class PreemptionPolicy(Protocol):
    """Chooses the mode for one victim."""

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:
        """Mode for a victim with that many computed tokens in that many blocks. A full host pool means recompute."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """Always forget: costs compute, needs no host memory."""

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:  # noqa: ARG002
        """Recompute."""
        return PreemptionMode.RECOMPUTE


@dataclass(frozen=True, slots=True)
class Swap:
    """Always move to the host, as long as there is room."""

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:  # noqa: ARG002
        """Swap."""
        return PreemptionMode.SWAP


@dataclass(frozen=True, slots=True)
class Cheaper:
    """Whichever takes less time: tokens * `prefill_s_per_token` against 2 * blocks * `transfer_s_per_block` (out and in).

    The prefill time per token is the marginal one, of a token added to a step that is compute-bound.
    """

    prefill_s_per_token: float
    transfer_s_per_block: float

    def __post_init__(self) -> None:
        for name in ("prefill_s_per_token", "transfer_s_per_block"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value <= sys.float_info.max:
                raise ConfigError(f"{name} must be a finite number of seconds >= 0, found {shown(value)}")

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:
        """Recompute if it is not slower than swapping out and in again."""
        recompute_s = num_computed_tokens * self.prefill_s_per_token
        swap_s = 2 * num_blocks * self.transfer_s_per_block
        return PreemptionMode.RECOMPUTE if recompute_s <= swap_s else PreemptionMode.SWAP
