from __future__ import annotations

import numpy as np
import pytest

from pagedkv.simulations.reports.timeline import Timeline
from pagedkv.simulations.run import Run
from pagedkv.simulations.step_log import StepLog


def steps_of(*records: tuple[float, float, int]) -> StepLog:
    steps = StepLog()
    for start, duration, blocks in records:
        steps.append((start, duration, 1, 0, 1, blocks))
    return steps


def test_few_steps_are_kept_as_they_are_with_the_idle_time_between(run: Run) -> None:
    timeline = Timeline(run.steps, start_s=0.0, max_intervals=100)
    blocks, tokens = run.steps.column("num_used_blocks"), run.steps.column("num_tokens")
    assert timeline.is_exact
    assert timeline.edges_s.tolist() == [0, 1, 2, 4, 6]
    assert timeline.maximum(blocks).tolist() == [2, 2, 0, 5]
    assert timeline.mean(blocks).tolist() == [2, 2, 0, 5]
    assert timeline.rate(tokens).tolist() == [4, 1, 0, 2]
    assert timeline.mean_of_steps(tokens)[[0, 1, 3]].tolist() == [4, 1, 4]
    assert np.isnan(timeline.mean_of_steps(tokens)[2])


def test_many_steps_share_intervals_weighted_by_time() -> None:
    # Blocks: 8 in [0, 1), 2 in [1, 2), none until 3, then 6 in [3, 4); two intervals of 2 s.
    steps = steps_of((0, 1, 8), (1, 0.5, 2), (1.5, 0.5, 2), (3, 1, 6))
    blocks = steps.column("num_used_blocks")
    timeline = Timeline(steps, start_s=0.0, max_intervals=2)
    assert (timeline.is_exact, timeline.edges_s.tolist(), timeline.interval_s) == (False, [0, 2, 4], 2.0)
    assert timeline.mean(blocks).tolist() == [5, 3]
    assert timeline.maximum(blocks).tolist() == [8, 6]
    assert timeline.mean_of_steps(blocks).tolist() == [4, 6]
    assert timeline.rate(blocks).tolist() == [6, 3]


def test_a_step_longer_than_an_interval_counts_in_each_that_it_touches() -> None:
    steps = steps_of((0, 4, 8), (4, 1, 1), (6, 2, 3))
    blocks = steps.column("num_used_blocks")
    timeline = Timeline(steps, start_s=0.0, max_intervals=4)
    assert timeline.maximum(blocks).tolist() == [8, 8, 1, 3]
    assert timeline.mean(blocks).tolist() == [8, 8, 0.5, 3]
    assert timeline.rate(blocks).tolist() == [2, 2, 0.5, 1.5]


def test_the_peak_of_one_short_step_is_not_lost() -> None:
    steps = StepLog()
    used = np.ones(10_000, np.int64)
    used[4321] = 77
    steps.append_many(np.arange(10_000) / 100, np.full(10_000, 0.01), used, num_rows=1, num_waiting=0)
    timeline = Timeline(steps, start_s=0.0, max_intervals=10)
    assert timeline.maximum(used).max() == 77
    assert timeline.mean(used).sum() == pytest.approx(10 + 76 / 1000)


def test_idle_time_before_the_first_step_is_zero() -> None:
    timeline = Timeline(steps_of((3, 1, 5)), start_s=1.0, max_intervals=10)
    assert timeline.edges_s.tolist() == [1, 3, 4]
    assert timeline.mean(np.array([5.0])).tolist() == [0, 5]


def test_rounding_between_steps_leaves_no_idle_time() -> None:
    timeline = Timeline(steps_of((0.0, 0.3 - 1e-16, 1), (0.3, 0.6, 2)), start_s=0.0, max_intervals=10)
    assert len(timeline) == 2


@pytest.mark.parametrize("steps", [steps_of(), steps_of((0, 0, 1))])
def test_a_run_of_no_length_has_no_intervals(steps: StepLog) -> None:
    timeline = Timeline(steps, start_s=0.0, max_intervals=10)
    assert (len(timeline), timeline.interval_s) == (0, 0.0)
    values = steps.column("num_used_blocks")
    assert [len(values_of(values)) for values_of in (timeline.mean, timeline.maximum, timeline.rate)] == [0, 0, 0]
