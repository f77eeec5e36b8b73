"""Which samples a step has brought to their end, and why."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    operations, and Python-level work for rows that end, or whose last token may be a stop token of some live sample.
    """
    rows = new.rows
    ends = memory.sequences.num_known[rows] >= running.max_tokens[rows]
    finished: Ended = []
    stops = _stops(running, kinds, new)
    if stops is not None:
        finished = _told(running, rows[stops], FinishReason.STOP)
        ends &= ~stops
    ending = ends.nonzero()[0]
    if len(ending):
        finished += _told(running, rows[ending], FinishReason.LENGTH)
    if kinds.num_prefill_only:
        finished += _prefilled(memory, running, computed_rows)
    return finished


def _told(running: RunningRows, rows: Rows, reason: FinishReason) -> Ended:
    return [(sample, reason.value) for sample in running.samples[rows].tolist()]


def _stops(running: RunningRows, kinds: LiveKinds, new: NewTokens) -> NDArray[np.bool_] | None:
    """(s,) bool: rows that the engine ends, or whose last new token is one that ends them. None if no row is. O(rows)."""
    stops = new.stopped
    token_ids = new.last_token_ids if kinds.num_with_stops else None
    if token_ids is None:
        return stops
    places = kinds.places_of_stops(token_ids)
    if not len(places):
        return stops
    samples, tokens = running.samples[new.rows[places]].tolist(), token_ids[places].tolist()
    at_stop = [token in sample.request.stop_token_ids for sample, token in zip(samples, tokens, strict=True)]
    stops = np.zeros(len(token_ids), np.bool_) if stops is None else stops.copy()
    stops[places] |= at_stop
    return stops


def _prefilled(memory: RowMemory, running: RunningRows, rows: Rows) -> Ended:
    """Samples of these rows that were to compute their prompt only, and have. O(rows)."""
    is_computed = memory.sequences.num_computed[rows] == memory.sequences.num_known[rows]
    samples = running.samples[rows[np.flatnonzero(is_computed)]].tolist()
    return [
        (sample, FinishReason.LENGTH.value)
        for sample in samples
        if sample is not None and sample.request.max_new_tokens == 0
    ]
