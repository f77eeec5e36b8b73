"""The outcome of a replay: what happened to every request and in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.scheduler.events import Preempted
from pagedkv.simulations.step_log import StepLog, TokenGaps
from pagedkv.simulations.traces import Trace

__all__ = ["RequestLog", "Run"]


@dataclass(frozen=True, slots=True, eq=False)
class RequestLog:
    """Columns over the trace's requests, (n,) each; times are seconds of the trace, NaN where they never came.

    admitted_s:      first admission
    first_token_s:   end of the step that gave the first token; of the last prompt step where none is sampled
    finished_s:      end of the step that gave the last token
    num_output:      tokens generated
    num_hit:         prompt tokens found in the prefix cache at the first admission
    num_preemptions: times that the request lost its seat
    is_rejected:     whether it was refused because it could never fit
    """

    admitted_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    num_output: NDArray[np.int64]
    num_hit: NDArray[np.int64]
    num_preemptions: NDArray[np.int64]
    is_rejected: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_requests: int) -> RequestLog:
        """A log of requests to which nothing has happened yet."""
        return cls(
            admitted_s=np.full(num_requests, np.nan),
            first_token_s=np.full(num_requests, np.nan),
            finished_s=np.full(num_requests, np.nan),
            num_output=np.zeros(num_requests, np.int64),
            num_hit=np.zeros(num_requests, np.int64),
            num_preemptions=np.zeros(num_requests, np.int64),
            is_rejected=np.zeros(num_requests, np.bool_),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Everything that reports are made of.

    `configuration` is JSON-able and says what was replayed on what; `preemptions` are in order; `rejections` maps the
    index of a refused request to the reason; `num_blocks` is the size of the device pool; `wall_s` is the only field
    that differs between two runs of the same thing.
    """

    trace: Trace
    configuration: dict[str, Any]
    requests: RequestLog
    steps: StepLog
    gaps: TokenGaps
    preemptions: list[Preempted]
    rejections: dict[int, str]
    num_blocks: int
    wall_s: float
