"""A step log on a time axis of few intervals, with nothing lost but what lies within an interval."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulations.step_log import StepLog

__all__ = ["Timeline"]

Floats = NDArray[np.float64]


class Timeline:
    """Intervals of time, and what the steps did in each.

    edges_s:  (num_intervals + 1,) seconds, ascending; interval `i` is `[edges_s[i], edges_s[i + 1])`
    is_exact: whether the intervals are the steps themselves and the idle times between them; else they are equally long

    A run of no length has no intervals. Idle time counts as zero of everything.
    """

    __slots__ = ("_ends", "_firsts", "_lasts", "_starts", "edges_s", "is_exact")

    def __init__(self, steps: StepLog, *, start_s: float, max_intervals: int) -> None:
        """Cut the time from `start_s` to the end of the last step into at most `max_intervals`. O(steps)."""
        self._starts = starts = np.ascontiguousarray(steps.column("start_s"))
        self._ends = ends = starts + steps.column("duration_s")
        if len(steps):
            # A step that ends within a nanosecond of the next one's start leaves no idle time: that is rounding.
            ends[:-1] = np.where(starts[1:] - ends[:-1] < 1e-9, starts[1:], ends[:-1])
        span = float(ends[-1]) - start_s if len(steps) else 0.0
        self.is_exact = 2 * len(steps) + 1 <= max_intervals
        if span <= 0:
            self.edges_s: Floats = np.empty(0)
        elif self.is_exact:
            self.edges_s = np.unique(np.concatenate(([start_s], starts, ends)))
        else:
            self.edges_s = np.linspace(start_s, float(ends[-1]), max_intervals + 1)
        self._firsts = np.minimum(starts.searchsorted(self.edges_s), ends.searchsorted(self.edges_s, side="right"))
        self._lasts = starts.searchsorted(self.edges_s)

    def __len__(self) -> int:
        return max(len(self.edges_s) - 1, 0)

    @property
    def interval_s(self) -> float:
        """Length of an interval; the mean one where they differ, 0 where there is none."""
        return float(self.edges_s[-1] - self.edges_s[0]) / len(self) if len(self) else 0.0

    def mean(self, values: NDArray[Any]) -> Floats:
        """Time-weighted mean of a value that each step holds while it runs. (num_intervals,)."""
        if self.is_exact:
            return self.maximum(values)  # No interval holds more than one step, and this way nothing is rounded.
        return self._integral(values * (self._ends - self._starts)) / np.diff(self.edges_s)

    def mean_of_steps(self, values: NDArray[Any]) -> Floats:
        """Mean over the steps, long and short ones alike; NaN where there is none. (num_intervals,)."""
        num_steps = self._integral(np.ones(len(values)))
        sums = self.maximum(values) if self.is_exact else self._integral(values)
        divisors = 1.0 if self.is_exact else np.where(num_steps > 0, num_steps, 1.0)
        return np.where(num_steps > 0, sums / divisors, np.nan)

    def rate(self, amounts: NDArray[Any]) -> Floats:
        """Amount per second, each step's spread evenly over its duration. (num_intervals,)."""
        return self._integral(amounts) / np.diff(self.edges_s)

    def maximum(self, values: NDArray[Any]) -> Floats:
        """Greatest value of the steps that touch an interval; 0 where none does. (num_intervals,)."""
        if not len(self):
            return np.empty(0)
        firsts, lasts = self._firsts[:-1], self._lasts[1:]
        padded = np.append(values, 0.0)
        pairs = np.column_stack((firsts, np.maximum(firsts, lasts))).ravel()
        return np.where(lasts > firsts, np.maximum.reduceat(padded, pairs)[::2], 0.0)

    def _integral(self, amounts: NDArray[Any]) -> Floats:
        """Sum of the amounts in each interval, a step's split in proportion to time."""
        if not len(self):
            return np.empty(0)
        times = np.column_stack((self._starts, self._ends)).ravel()
        totals = np.concatenate(([0.0], np.cumsum(amounts)))
        sums = np.column_stack((totals[:-1], totals[1:])).ravel()
        return np.diff(np.interp(self.edges_s, times, sums))
