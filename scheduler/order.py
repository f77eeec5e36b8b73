"""Who goes first among waiting requests, and who goes first when blocks run short."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s, shown
from pagedkv.errors import ConfigError
from pagedkv.scheduler.request import Request

__all__ = ["FCFS", "LatestArrival", "LowestPriority", "Priority", "QueuePolicy", "VictimPolicy"]


class QueuePolicy(Protocol):
    """Orders the waiting queue."""

    def rank(self, request: Request, now: float) -> float:
        """The request's place, fixed when it arrives: lower ranks go first, equal ones in order of arrival."""


@dataclass(frozen=True, slots=True)
class FCFS:
    """First come, first served: priorities are ignored."""

    def rank(self, request: Request, now: float) -> float:  # noqa: ARG002 - the protocol's signature
        """All are equal; arrival decides."""
        return 0.0


@dataclass(frozen=True, slots=True)
class Priority:
    """Lower `priority` first, ageing by `ageing_per_s` for each second of waiting.

    After t seconds a request stands at `priority - ageing_per_s * t`. All age alike, so the difference between two
    never changes and the order can be fixed at arrival: rank = priority + ageing_per_s * arrival. A request is
    passed only by those that arrive within (difference of priorities) / ageing_per_s seconds after it.
    """

    ageing_per_s: float = 0.01

    def __post_init__(self) -> None:
        ageing = self.ageing_per_s
        if not isinstance(ageing, float | int) or not 0 <= ageing <= sys.float_info.max:
            raise ConfigError(f"ageing_per_s must be a finite number >= 0, found {shown(ageing)}")

    def rank(self, request: Request, now: float) -> float:
        """Priority, plus the ageing that later arrivals will never catch up."""
        return request.priority + self.ageing_per_s * now


class VictimPolicy(Protocol):
    """Chooses who is preempted."""

    def choose(self, ranks: NDArray[np.float64], serials: Int64s) -> int:
        """Index of the victim among running requests with these ranks and arrival numbers, (n,) each, n >= 1."""


@dataclass(frozen=True, slots=True)
class LatestArrival:
    """The request that arrived last."""

    def choose(self, ranks: NDArray[np.float64], serials: Int64s) -> int:  # noqa: ARG002 - the protocol's signature
        """Largest arrival number. O(n)."""
        return int(serials.argmax())


@dataclass(frozen=True, slots=True)
class LowestPriority:
    """The request with the highest rank, the latest arrival among equals: under FCFS, where all are, the latest arrival."""

    def choose(self, ranks: NDArray[np.float64], serials: Int64s) -> int:
        """Largest (rank, arrival number). O(n)."""
        return int(np.lexsort((serials, ranks))[-1])
