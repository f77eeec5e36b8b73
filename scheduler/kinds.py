"""How many live samples are of the kinds that cost extra work in every step, so that the others need not pay for them."""

from __future__ import annotations

from pagedkv.content import SimulatedContent
from pagedkv.scheduler.sample import Sample

__all__ = ["LiveKinds"]


class LiveKinds:
    """Counts of live samples.

    num_with_tokens:  whose prompt is real token ids: an update must bring tokens, and leaps are off
    num_prefill_only: that want no new token: they end when their prompt is computed
    num_with_stops:   that a stop token may end: their tokens are looked at
    """

    __slots__ = ("num_prefill_only", "num_with_stops", "num_with_tokens")

    def __init__(self) -> None:
        self.num_with_tokens = 0
        self.num_prefill_only = 0
        self.num_with_stops = 0

    def add(self, sample: Sample) -> None:
        """A sample begins to live. O(1)."""
        self._count(sample, 1)

    def remove(self, sample: Sample) -> None:
        """A sample has ended. O(1)."""
        self._count(sample, -1)

    def _count(self, sample: Sample, change: int) -> None:
        if not isinstance(sample.content, SimulatedContent):
            self.num_with_tokens += change
        if sample.request.max_new_tokens == 0:
            self.num_prefill_only += change
        if len(sample.request.stop_token_ids):
            self.num_with_stops += change
