"""Buckets, bounds and quantiles."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import InvalidArgumentError
from pagedkv.engine.metrics import Histogram, HistogramSnapshot


def test_a_bound_belongs_to_the_bucket_below_it():
    one, many = Histogram([1, 2]), Histogram([1, 2])
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        one.observe(value)
    many.observe_many(np.array([0.5, 1.0, 1.5, 2.0, 2.5]))
    same = Histogram([1, 2])
    same.observe_many(np.array([2.0, 1.5, 2.0]))

    assert one.snapshot() == many.snapshot() == HistogramSnapshot((1.0, 2.0), (2, 2, 1), 7.5)
    assert same.snapshot() == HistogramSnapshot((1.0, 2.0), (0, 3, 0), 5.5)


def test_quantiles_are_read_as_prometheus_does():
    histogram = HistogramSnapshot((1.0, 2.0, 4.0), (2, 0, 6, 2), 30.0)

    assert [histogram.quantile(q) for q in (0.0, 0.1, 0.2, 0.5, 0.8, 1.0)] == [0.0, 0.5, 1.0, 3.0, 4.0, 4.0]
    assert histogram.mean == 3.0
    assert histogram.cumulative == (2, 2, 8, 10)


def test_an_empty_histogram_has_no_quantile_and_no_mean():
    histogram = Histogram([1.0]).snapshot()

    assert (histogram.count, histogram.mean, histogram.quantile(0.5)) == (0, None, None)


@pytest.mark.parametrize("bounds", [[], [1.0, 1.0], [2.0, 1.0], [1.0, float("inf")], [float("nan")]])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(InvalidArgumentError, match="bounds"):
        Histogram(bounds)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_beyond_all_values_is_refused(q):
    with pytest.raises(InvalidArgumentError, match="q must be in"):
        Histogram([1.0]).snapshot().quantile(q)
