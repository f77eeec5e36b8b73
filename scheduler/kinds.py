"""How many live samples are of the kinds that cost extra work in every step, so that the others need not pay for them."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int32s, Int64s
from pagedkv.content import SimulatedContent
from pagedkv.scheduler.sample import Sample

__all__ = ["LiveKinds"]

NUM_BUCKETS = 4096


class LiveKinds:
    """Counts of live samples.

    num_with_tokens:  whose prompt is real token ids: an update must bring tokens, and leaps are off
    num_prefill_only: that want no new token: they end when their prompt is computed
    num_with_stops:   that a stop token may end: their tokens are looked at

    Stop tokens are counted by bucket, token id modulo 4096, so that one gather finds the few tokens of a step that may be
    one. A table of the ids themselves would have to be made anew whenever a sample begins or ends.
    """

    __slots__ = ("_num_stops", "_view_num_stops", "num_prefill_only", "num_with_stops", "num_with_tokens")

    def __init__(self) -> None:
        self.num_with_tokens = 0
        self.num_prefill_only = 0
        self.num_with_stops = 0
        self._num_stops: Int64s = np.zeros(NUM_BUCKETS, np.int64)
        self._view_num_stops = self._num_stops.data  # Single entries cost half as much as through the array.

    def add(self, sample: Sample) -> None:
        """A sample begins to live. O(its stop tokens)."""
        self._count(sample, 1)

    def remove(self, sample: Sample) -> None:
        """A sample has ended. O(its stop tokens)."""
        self._count(sample, -1)

    def places_of_stops(self, token_ids: Int32s) -> Int64s:
        """Where in `token_ids` a stop token of some live sample may be: nowhere else is one. O(n) array operations."""
        places: Int64s = self._num_stops[token_ids % NUM_BUCKETS].nonzero()[0]
        return places

    def _count(self, sample: Sample, change: int) -> None:
        if not isinstance(sample.content, SimulatedContent):
            self.num_with_tokens += change
        if sample.request.max_new_tokens == 0:
            self.num_prefill_only += change
        stops = sample.request.stop_token_ids
        if stops:
            self.num_with_stops += change
            num_stops = self._view_num_stops
            for token_id in stops:
                num_stops[token_id % NUM_BUCKETS] += change
