"""Which samples a step has brought to their end, and why."""

from __future__ import annotations

from itertools import chain, compress

import numpy as np

from pagedkv.arrays import Rows
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.kinds import LiveKinds
from pagedkv.scheduler.outcome import NewTokens
from pagedkv.scheduler.request import FinishReason
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample

__all__ = ["Ended", "ended_samples"]

Ended = list[tuple[Sample, str]]


def ended_samples(
    memory: RowMemory, running: RunningRows, kinds: LiveKinds, *, computed_rows: Rows, new: NewTokens
) -> Ended:
    """Samples that end with these new tokens, already known: stopped ones first, then those that have all theirs.

    `computed_rows` are the rows of the step, in which samples that want no token may have ended. O(rows) array
    operations, and Python-level work for each row while samples with stop tokens are live.
    """
    finished = _at_length(memory, running, new.rows)
    if new.stopped is not None or (kinds.num_with_stops and new.token_ids is not None):
        stopped = _stopped(running, new)
        finished = stopped + [entry for entry in finished if not any(entry[0] is sample for sample, _ in stopped)]
    if kinds.num_prefill_only:
        finished += _prefilled(memory, running, computed_rows)
    return finished


def _at_length(memory: RowMemory, running: RunningRows, rows: Rows) -> Ended:
    """Samples of these rows that have all their tokens. O(rows) array operations."""
    ending = (memory.sequences.num_known[rows] >= running.max_tokens[rows]).nonzero()[0]
    if not len(ending):
        return []
    return [(sample, FinishReason.LENGTH.value) for sample in running.samples[rows[ending]].tolist()]


def _stopped(running: RunningRows, new: NewTokens) -> Ended:
    """Samples that the engine ends, or whose last new token is one that ends them. O(rows)."""
    samples = running.samples[new.rows].tolist()
    last_token_ids = new.last_token_ids
    stopped = [] if last_token_ids is None else _at_stop_token(samples, last_token_ids.tolist())
    if new.stopped is not None:
        flagged = list(compress(samples, new.stopped.tolist()))
        stopped = [sample for sample in samples if any(sample is other for other in chain(flagged, stopped))]
    return [(sample, FinishReason.STOP.value) for sample in stopped]


def _at_stop_token(samples: list[Sample], token_ids: list[int]) -> list[Sample]:
    """Samples of which the last new token is one that ends them."""
    return [sample for sample, token in zip(samples, token_ids, strict=True) if token in sample.request.stop_token_ids]


def _prefilled(memory: RowMemory, running: RunningRows, rows: Rows) -> Ended:
    """Samples of these rows that were to compute their prompt only, and have. O(rows)."""
    is_computed = memory.sequences.num_computed[rows] == memory.sequences.num_known[rows]
    samples = running.samples[rows[np.flatnonzero(is_computed)]].tolist()
    return [
        (sample, FinishReason.LENGTH.value)
        for sample in samples
        if sample is not None and sample.request.max_new_tokens == 0
    ]
