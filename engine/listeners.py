"""New tokens on their way to the samples that look at them as they come."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows, packed_runs
from pagedkv.engine.live_requests import LiveSample
from pagedkv.engine.row_columns import RowColumns
from pagedkv.engine.sampling import Sampled
from pagedkv.scheduler import StepOutcome

__all__ = ["tell_listeners"]


def tell_listeners(
    columns: RowColumns, rows: Rows, sampled: Sampled, counts: Int64s | None
) -> tuple[list[LiveSample], StepOutcome | Int32s]:
    """Push the new tokens of `rows` to the samples that listen; returns these, and what the scheduler is to hear.

    sampled: packed by row
    counts:  (rows,) int64, how many tokens each row got; None: one each

    Tokens of a row behind one that ended its sample are dropped.
    """
    touched: list[LiveSample] = []
    listening = columns.listens[rows].nonzero()[0]
    if not len(listening) and counts is None:
        return touched, sampled.token_ids
    stopped = np.zeros(len(rows), np.bool_)
    kept = np.ones(len(rows), np.int64) if counts is None else counts
    firsts = kept.cumsum() - kept
    for idx in listening.tolist():
        sample = columns.samples[rows[idx]]
        if sample is None:
            continue
        touched.append(sample)
        first = int(firsts[idx])
        for place in range(first, first + int(kept[idx])):
            logprobs = None if sampled.logprobs is None else sampled.logprobs[place]
            stopped[idx] = sample.push(int(sampled.token_ids[place]), logprobs)
            if sample.stop is not None:
                kept[idx] = place + 1 - first
                break
    if counts is None and not stopped.any():
        return touched, sampled.token_ids
    return touched, StepOutcome(sampled.token_ids[packed_runs(firsts, kept)], kept, stopped)
