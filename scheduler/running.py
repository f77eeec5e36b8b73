"""Columns of the running samples, indexed by row, the order in which they were admitted, and the seats that they take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s, Rows
from pagedkv.scheduler.sample import Sample, SampleState

__all__ = ["RunningRows"]

NO_ROWS = np.empty(0, np.int64)


class RunningRows:
    """Which rows run, in order of admission, with what the hot path must know of each.

    max_tokens:      (rows,) int64, length at which the sample ends
    protected_until: (rows,) int64, number of known tokens below which it should not be preempted
    is_settled:      (rows,) bool, whether it was preempted as often as may be, and keeps its seat until it ends
    ranks, serials:  (rows,) its place in the queue
    samples:         (rows,) object, the sample, None where no sample runs
    num_seats:       seats taken: one a row, and those kept for samples that are still to fork off
    unforked:        rows whose request has more samples to come, once its prompt is computed
    vacated:         rows that were removed and that no plan has told yet
    """

    __slots__ = (
        "_is_lent",
        "_num_gaps",
        "_num_rows",
        "_order",
        "_places",
        "is_settled",
        "max_tokens",
        "num_seats",
        "protected_until",
        "ranks",
        "samples",
        "serials",
        "unforked",
        "vacated",
    )

    def __init__(self, num_rows: int = 64) -> None:
        self._order: Rows = np.zeros(num_rows, np.int64)
        self._places: Int64s = np.zeros(num_rows, np.int64)  # Of each row in the order.
        self._num_rows = 0
        self._num_gaps = 0
        self.max_tokens: Int64s = np.zeros(num_rows, np.int64)
        self.protected_until: Int64s = np.zeros(num_rows, np.int64)
        self.is_settled: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self.ranks: NDArray[np.float64] = np.zeros(num_rows)
        self.serials: Int64s = np.zeros(num_rows, np.int64)
        self.samples: NDArray[np.object_] = np.full(num_rows, None, object)
        self._is_lent = False
        self.num_seats = 0
        self.unforked: dict[int, Sample] = {}
        self.vacated: set[int] = set()

    def __len__(self) -> int:
        return self._num_rows - self._num_gaps

    @property
    def rows(self) -> Rows:
        """(n,) int64, running rows in order of admission, a view. O(1), or O(n) once after removals."""
        if self._num_gaps:
            order = self._order[: self._num_rows]
            kept = order[order >= 0]
            self._num_rows = len(kept)
            self._num_gaps = 0
            self._order[: len(kept)] = kept
            self._places[kept] = np.arange(len(kept))
        return self._order[: self._num_rows]

    def lend_samples(self) -> NDArray[np.object_]:
        """(rows,) object, the samples as they are now; who changes them next copies them first. O(1).

        A gather would count references of every sample up, and down again: a miss of the processor's caches for each.
        """
        self._is_lent = True
        return self.samples

    def settled(self) -> list[Sample]:
        """The settled samples, in order of admission. O(running)."""
        rows = self.rows
        samples: list[Sample] = self.samples[rows[self.is_settled[rows]]].tolist()
        return samples

    def add(self, sample: Sample, *, protected_until: int, is_settled: bool = False) -> None:
        """A sample with a row starts running, last in order. O(1) amortised."""
        row = sample.row
        if row >= len(self.samples):
            self._grow(row + 1)
        if self._num_rows == len(self._order):
            self._order = np.concatenate((self._order, np.zeros_like(self._order)))
        self._order[self._num_rows] = row
        self._places[row] = self._num_rows
        self._num_rows += 1
        self.num_seats += sample.num_samples
        if sample.num_samples > 1:
            self.unforked[row] = sample
        sample.state = SampleState.RUNNING
        self.max_tokens[row] = sample.max_tokens
        self.protected_until[row] = protected_until
        self.is_settled[row] = is_settled
        self.ranks[row], self.serials[row] = sample.place[0], sample.place[1]
        self._set_sample(row, sample)

    def remove(self, sample: Sample) -> None:
        """A sample stops running. Leaves a gap that the next look at `rows` closes. O(1)."""
        self._order[self._places[sample.row]] = -1
        self._num_gaps += 1
        self.num_seats -= sample.num_samples
        self.unforked.pop(sample.row, None)
        self.vacated.add(sample.row)
        self._set_sample(sample.row, None)

    def take_vacated(self) -> Rows:
        """(v,) int64, ascending: rows that were removed since this was asked for, who may run again. O(v log v)."""
        if not self.vacated:
            return NO_ROWS
        rows = np.array(sorted(self.vacated), np.int64)
        self.vacated.clear()
        return rows

    def mark_forked(self, sample: Sample) -> None:
        """The other samples of this one's request are about to get rows, and take the seats kept for them."""
        del self.unforked[sample.row]
        self.num_seats -= sample.num_samples - 1
        sample.num_samples = 1

    def mark_unforked(self, sample: Sample) -> None:
        """The other samples of this running one's request are gone again: keep seats for them."""
        sample.num_samples = sample.request.n
        self.num_seats += sample.num_samples - 1
        self.unforked[sample.row] = sample

    def _set_sample(self, row: int, sample: Sample | None) -> None:
        if self._is_lent:
            self.samples, self._is_lent = self.samples.copy(), False
        self.samples[row] = sample

    def _grow(self, num_rows: int) -> None:
        old = len(self.samples)
        new = max(num_rows, 2 * old)
        for name in ("_places", "is_settled", "max_tokens", "protected_until", "ranks", "serials"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(new - old, column.dtype))))
        self.samples = np.concatenate((self.samples, np.full(new - old, None, object)))
