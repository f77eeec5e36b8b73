"""Which faults happen in which step: drawn from a seed, or written down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS
from pagedkv.testing.soak.settings import Fault, FaultKind

__all__ = ["FaultSource", "NoFaults", "RandomFaults", "ScriptedFaults"]

# Share of the steps in which each happens, and the range from which its detail is drawn.
RATES: dict[FaultKind, tuple[float, int, int]] = {
    FaultKind.ALLOCATION: (0.02, len(ALLOCATION_POINTS), 5 * len(ALLOCATION_POINTS)),
    FaultKind.DEVICE_FULL: (0.005, 1, 40),
    FaultKind.HOST_FULL: (0.005, 1, 40),
    FaultKind.COPY_PARTIAL: (0.01, 0, 6),
    FaultKind.COPY_LATE: (0.01, 1, 30),
    FaultKind.COPY_TWICE: (0.02, 1, 2),
    FaultKind.COPY_NEVER: (0.005, 1, 2),
    FaultKind.ABORT: (0.03, 0, 1_000_000),
    FaultKind.DUPLICATE_ID: (0.005, 0, 1_000_000),
    FaultKind.UNKNOWN_ID: (0.005, 1, 2),
    FaultKind.CLOCK_JUMP: (0.002, -7200, 7200),
    FaultKind.BAD_CALL: (0.01, 1, 2),
    FaultKind.SINK_RAISES: (0.01, 1, 6),
    FaultKind.SINK_CALLS_BACK: (0.005, 1, 6),
}


class FaultSource(Protocol):
    """Tells a world what goes wrong."""

    def at(self, step: int) -> dict[FaultKind, int]:
        """The faults of this step, with their details. Steps are asked for once, in order."""


class NoFaults:
    """Nothing goes wrong."""

    def at(self, step: int) -> dict[FaultKind, int]:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return {}


class RandomFaults:
    """Each kind at its own rate, every one more often than it should ever be."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._kinds = list(RATES)
        self._rates = np.array([rate for rate, _, _ in RATES.values()])

    def at(self, step: int) -> dict[FaultKind, int]:  # noqa: ARG002 - steps are asked for in order
        """What is drawn for one more step."""
        hit = np.flatnonzero(self._rng.random(len(self._rates)) < self._rates)
        faults = {}
        for i in hit.tolist():
            _, low, high = RATES[self._kinds[i]]
            faults[self._kinds[i]] = int(self._rng.integers(low, high))
        return faults


class ScriptedFaults:
    """Faults that were written down, such as Hypothesis draws."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._by_step: dict[int, dict[FaultKind, int]] = {}
        for fault in faults:
            self._by_step.setdefault(fault.step, {})[fault.kind] = fault.detail

    def at(self, step: int) -> dict[FaultKind, int]:
        """What was written down for this step."""
        return self._by_step.get(step, {})
