"""Which samples a step has brought to their end, and why."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int32s, Rows
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.request import FinishReason
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample

__all__ = ["at_length", "at_stop_token", "prefilled"]

Ended = list[tuple[Sample, str]]


def at_length(memory: RowMemory, running: RunningRows, rows: Rows) -> Ended:
    """Samples of these rows that have all their tokens. O(rows) array operations."""
    ending = (memory.sequences.num_known[rows] >= running.max_tokens[rows]).nonzero()[0]
    if not len(ending):
        return []
    return [(sample, FinishReason.LENGTH.value) for sample in running.samples[rows[ending]].tolist()]


def at_stop_token(running: RunningRows, rows: Rows, token_ids: Int32s) -> Ended:
    """Samples of these rows whose new token is one that ends them. O(rows)."""
    return [
        (sample, FinishReason.STOP.value)
        for sample, token in zip(running.samples[rows].tolist(), token_ids.tolist(), strict=True)
        if token in sample.request.stop_token_ids
    ]


def prefilled(memory: RowMemory, running: RunningRows, rows: Rows) -> Ended:
    """Samples of these rows that were to compute their prompt only, and have. O(rows)."""
    is_computed = memory.sequences.num_computed[rows] == memory.sequences.num_known[rows]
    samples = running.samples[rows[np.flatnonzero(is_computed)]].tolist()
    return [
        (sample, FinishReason.LENGTH.value)
        for sample in samples
        if sample is not None and sample.request.max_new_tokens == 0
    ]
