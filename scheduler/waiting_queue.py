"""Requests that wait for a seat, in the policy's order."""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedDict

from pagedkv.scheduler.sample import Sample

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """A sorted map from (rank, arrival number, sample) to samples: every verb is O(log n)."""

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: SortedDict = SortedDict()

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in order; the queue must not change meanwhile."""
        return iter(self._samples.values())

    def __contains__(self, sample: Sample) -> bool:
        return self._samples.get(sample.place) is sample

    def push(self, sample: Sample) -> None:
        """Put a sample at its place: a preempted one comes back to where it stood. O(log n)."""
        self._samples[sample.place] = sample

    def remove(self, sample: Sample) -> None:
        """Take a sample out. O(log n)."""
        del self._samples[sample.place]

    def nth(self, index: int) -> Sample:
        """The sample that `index` others stand before. O(log n)."""
        sample: Sample = self._samples.peekitem(index)[1]
        return sample
