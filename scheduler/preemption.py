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
        """Mode for a victim that must compute so many tokens again, or have so many blocks moved to the host.

        Tokens in blocks that the prefix cache names and others hold are not lost, so they do not count; the blocks do: a
        swap moves all of a sequence out, shared ones too, and what is then still on the device does not come back from
        the host. A full host pool means recompute.
        """


@dataclass(frozen=True, slots=True)
class Recompute:
    """Always forget: costs compute, needs no host memory."""

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:  # noqa: ARG002
        """Recompute."""
        return PreemptionMode.RECOMPUTE


@dataclass(frozen=True, slots=True)
class Swap:
    """Always move to the host, as long as there is room: all blocks of a victim, those that others share as well."""

    def choose(self, num_computed_tokens: int, num_blocks: int) -> PreemptionMode:  # noqa: ARG002
        """Swap."""
        return PreemptionMode.SWAP


@dataclass(frozen=True, slots=True)
class Cheaper:
    """Whichever takes less time: tokens * `prefill_s_per_token` against 2 * blocks * `transfer_s_per_block` (out and in).

    The prefill time per token is the marginal one, of a token added to a step that is compute-bound. Tokens in blocks
    that others share are not computed again, so they do not count.
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
