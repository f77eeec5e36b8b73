"""Which rows sample in a step; the first time that a request with several samples does, the others fork off."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int64s, Rows
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.kinds import LiveKinds
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample

__all__ = ["Sampling"]


class Sampling:
    """Chooses the rows that need a token. `forked` are the (first, other) samples that parted in the step being planned."""

    __slots__ = ("_kinds", "_live", "_memory", "_running", "forked")

    def __init__(
        self, memory: RowMemory, running: RunningRows, live: dict[str, list[Sample]], kinds: LiveKinds
    ) -> None:
        self._memory = memory
        self._running = running
        self._live = live
        self._kinds = kinds
        self.forked: list[tuple[Sample, Sample]] = []

    @property
    def is_plain(self) -> bool:
        """Whether every row that catches up needs one token: no sample is about to fork, and none wants no token. O(1)."""
        return not self._kinds.num_prefill_only and not self._running.unforked

    def choose(self, rows: Rows, stops: Int64s) -> tuple[Rows, Int64s]:
        """Rows that need a token: those that catch up with what is known and are not at their end. Forks samples.

        Returns them, and for each the index into `rows` of the row whose logits it samples from. O(rows).
        """
        known = self._memory.sequences.num_known[rows]
        caught_up = stops == known
        if self._kinds.num_prefill_only:
            caught_up &= known < self._running.max_tokens[rows]
        sources = caught_up.nonzero()[0]
        sampling_rows = rows[sources]
        unforked = self._running.unforked
        if unforked:
            for source, row in zip(sources.tolist(), sampling_rows.tolist(), strict=True):
                if row in unforked:
                    siblings = self._fork(unforked[row])
                    sampling_rows = np.concatenate((sampling_rows, siblings))
                    sources = np.concatenate((sources, np.full(len(siblings), source)))
        return sampling_rows, sources

    def _fork(self, sample: Sample) -> Rows:
        """The prompt of a request with several samples is computed in this step: give each of the others a row."""
        rows: list[int] = []
        try:
            for _ in range(1, sample.num_samples):
                rows.append(self._memory.fork(sample.row))  # noqa: PERF401 - those before one that fails are given back
        except BaseException:
            for row in rows:
                self._memory.close(row)
            raise
        self._running.mark_forked(sample)
        for sample_idx, row in enumerate(rows, start=1):
            sibling = sample.fork(sample_idx, row, self._memory.sequences.content(row))
            self._live[sample.request.request_id].append(sibling)
            self._running.add(sibling, protected_until=0)
            self._kinds.add(sibling)
            self.forked.append((sample, sibling))
        return np.array(rows, np.int64)
