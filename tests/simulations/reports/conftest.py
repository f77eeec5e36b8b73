from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagedkv.scheduler.events import Preempted
from pagedkv.simulations.run import RequestLog, Run
from pagedkv.simulations.step_log import StepLog, TokenGaps
from pagedkv.simulations.traces import Trace

REASON = "100 prompt + 5 new tokens need 26 blocks of 4, the pool has 10"


def make_run(*, name: str = "three", client: str = "b", wall_s: float = 0.5) -> Run:
    """Three requests in a pool of 10 blocks; all figures can be worked out in the head.

    Request 0 arrives at 0, has its first token at 1 and its second and last at 2; it is preempted once on the way.
    Nothing runs from 2 to 4. Request 1 arrives at 3.5, is admitted at 4, finds 4 of its 8 prompt tokens in the cache,
    and has its only token at 6. Request 2 can never fit.
    """
    trace = Trace.from_columns([0, 3.5, 3.5], [4, 8, 100], [2, 1, 5], clients=["a", client, "a"], name=name)
    steps = StepLog()
    for record in ((0.0, 1.0, 1, 0, 4, 2), (1.0, 1.0, 1, 1, 1, 2), (4.0, 2.0, 1, 0, 4, 5)):
        steps.append(record)
    gaps = TokenGaps()
    gaps.add(np.array([1.0]))
    log = RequestLog(
        admitted_s=np.array([0.0, 4.0, np.nan]),
        first_token_s=np.array([1.0, 6.0, np.nan]),
        finished_s=np.array([2.0, 6.0, np.nan]),
        num_output=np.array([2, 1, 0]),
        num_hit=np.array([0, 4, 0]),
        num_preemptions=np.array([1, 0, 0]),
        is_rejected=np.array([False, False, True]),
    )
    preemption = Preempted(
        time=1.0,
        step=2,
        request_id="0",
        sample_idx=0,
        mode="swap",
        num_computed_tokens=4,
        num_used_before=10,
        num_used_after=8,
        num_needed_blocks=1,
        reason="running requests need blocks",
    )
    return Run(
        trace=trace,
        configuration={"model": "tiny", "num_blocks": 10, "leaps": True, "cost_model": {"base_s": 0.1, "peak": None}},
        requests=log,
        steps=steps,
        gaps=gaps,
        preemptions=[preemption],
        rejections={2: REASON},
        num_blocks=10,
        wall_s=wall_s,
    )


def make_rejected_run() -> Run:
    """One request, which can never fit: no step at all."""
    log = RequestLog.empty(1)
    log.is_rejected[0] = True
    trace = Trace.from_columns([0.0], [100], [5], name="refused")
    return Run(trace, {}, log, StepLog(), TokenGaps(), [], {0: REASON}, num_blocks=10, wall_s=0.0)


@pytest.fixture
def run() -> Run:
    return make_run()


@pytest.fixture
def rejected_run() -> Run:
    return make_rejected_run()


@pytest.fixture
def run_maker() -> Callable[..., Run]:
    return make_run


@pytest.fixture
def long_run() -> Run:
    """Two requests of 3,000 tokens each, one row and one millisecond per step: more steps than a figure has points."""
    steps = StepLog()
    steps.append_many(np.arange(6000) / 1000, np.full(6000, 0.001), np.arange(6000) % 2 + 1, num_rows=1, num_waiting=0)
    log = RequestLog(
        admitted_s=np.array([0.0, 3.0]),
        first_token_s=np.array([0.001, 3.001]),
        finished_s=np.array([3.0, 6.0]),
        num_output=np.array([3000, 3000]),
        num_hit=np.array([0, 0]),
        num_preemptions=np.array([0, 0]),
        is_rejected=np.array([False, False]),
    )
    gaps = TokenGaps()
    gaps.add_steps(np.full(2999, 0.001), 1)
    gaps.add_steps(np.full(2999, 0.001), 1)
    trace = Trace.from_columns([0.0, 0.0], [1, 1], [3000, 3000], name="long")
    return Run(trace, {}, log, steps, gaps, [], {}, num_blocks=4, wall_s=1.0)
