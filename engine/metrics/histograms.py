"""Counts of values by bucket, many values at a time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import InvalidArgumentError

__all__ = ["Histogram", "HistogramSnapshot", "one_two_five"]


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """What a histogram held at one moment.

    bounds: upper bounds of the buckets, inclusive, ascending; one more bucket holds what exceeds the last
    counts: values in each bucket alone, len(bounds) + 1
    total:  sum of all values
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean of all values, exact; None where there is none."""
        return self.total / self.count if self.count else None

    @property
    def cumulative(self) -> tuple[int, ...]:
        """Number of values up to each bound, and of all, as Prometheus counts them; len(bounds) + 1."""
        return tuple(accumulate(self.counts))

    def quantile(self, q: float) -> float | None:
        """Estimate the q-quantile, 0..1, as PromQL's `histogram_quantile` does; None where there is no value.

        Values are taken to lie evenly within their bucket, and those beyond the last bound at that bound.
        """
        if not 0 <= q <= 1:
            raise InvalidArgumentError(f"q must be in 0..1, found {q!r}")
        cumulative = self.cumulative
        if not cumulative[-1]:
            return None
        rank = q * cumulative[-1]
        bucket = bisect_left(cumulative, rank)
        if bucket == len(self.bounds):
            return self.bounds[-1]
        low = self.bounds[bucket - 1] if bucket else 0.0
        before = cumulative[bucket] - self.counts[bucket]
        share = (rank - before) / self.counts[bucket] if self.counts[bucket] else 0.0
        return low + (self.bounds[bucket] - low) * share


class Histogram:
    """Counts of values by bucket and their sum; a bound belongs to the bucket below it, as in Prometheus.

    >>> histogram = Histogram((1.0, 2.0))
    >>> histogram.observe_many(np.array([0.5, 1.0, 1.5, 9.0]))
    >>> histogram.snapshot().counts
    (2, 1, 1)
    """

    __slots__ = ("_bounds", "_bounds_array", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        if not self._bounds or not all(math.isfinite(bound) for bound in self._bounds):
            raise InvalidArgumentError("a histogram needs finite bounds, at least one")
        if any(low >= high for low, high in zip(self._bounds, self._bounds[1:], strict=False)):
            raise InvalidArgumentError(f"bounds must ascend, found {self._bounds}")
        self._bounds_array = np.array(self._bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one value. O(log buckets)."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """Count (n,) values, at least one. O(n), a fixed number of array operations."""
        # The rows of a decode step mostly share one gap: two looks at the ends save the search for each.
        low = bisect_left(self._bounds, np.minimum.reduce(values))
        high = bisect_left(self._bounds, np.maximum.reduce(values))
        if low == high:
            self._counts[low] += len(values)
        else:
            buckets = np.bincount(self._bounds_array.searchsorted(values), minlength=len(self._counts))
            for bucket in range(low, high + 1):
                self._counts[bucket] += int(buckets[bucket])
        self._total += float(np.add.reduce(values))

    def snapshot(self) -> HistogramSnapshot:
        """A copy that does not change. O(buckets)."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)


def one_two_five(greatest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `greatest`, which is at least 1: vLLM's bounds for numbers of tokens.

    >>> one_two_five(60)
    (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    """
    exponents = range(len(str(greatest)))
    bounds = (digit * 10**exponent for exponent in exponents for digit in (1, 2, 5))
    return tuple(float(bound) for bound in bounds if bound <= greatest)
