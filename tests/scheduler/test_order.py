"""Who loses its seat: the policies on their own."""

import numpy as np

from pagedkv.scheduler import LatestArrival, LowestPriority


def test_the_latest_arrival_is_the_one_with_the_largest_number() -> None:
    assert LatestArrival().choose(np.array([0.0, 9.0, 1.0]), np.array([4, 2, 3])) == 0


def test_the_lowest_priority_has_the_highest_rank_and_among_equals_arrived_last() -> None:
    assert LowestPriority().choose(np.array([0.0, 2.0, 1.0]), np.array([2, 0, 1])) == 1
    assert LowestPriority().choose(np.array([2.0, 0.0, 2.0, 1.0]), np.array([1, 9, 0, 8])) == 0
