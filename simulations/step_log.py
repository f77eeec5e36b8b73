"""What happened in every step, in columns that grow as the replay goes on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepLog", "TokenGaps"]

COLUMNS = ("start_s", "duration_s", "num_rows", "num_waiting", "num_tokens", "num_used_blocks")


class StepLog:
    """One record per step: six float64 columns, appended one step or many at a time. O(1) amortised.

    start_s, duration_s: when the step began and how long it took
    num_rows:            rows that computed something
    num_waiting:         samples that waited for a seat, swapped ones included
    num_tokens:          tokens computed
    num_used_blocks:     device blocks held while the step ran
    """

    __slots__ = ("_num_steps", "_table")

    def __init__(self) -> None:
        self._table = np.empty((1024, len(COLUMNS)))
        self._num_steps = 0

    def __len__(self) -> int:
        return self._num_steps

    def append(self, record: tuple[float, float, int, int, int, int]) -> None:
        """Add one step, its fields in the order of the columns."""
        if self._num_steps == len(self._table):
            self._grow(1)
        self._table[self._num_steps] = record
        self._num_steps += 1

    def append_many(
        self,
        starts: NDArray[np.float64],
        durations: NDArray[np.float64],
        used_blocks: NDArray[np.int64],
        *,
        num_rows: int,
        num_waiting: int,
    ) -> None:
        """Add (k,) decode steps of the same rows, one token each."""
        num = len(starts)
        if self._num_steps + num > len(self._table):
            self._grow(num)
        records = self._table[self._num_steps : self._num_steps + num]
        records[:, 0] = starts
        records[:, 1] = durations
        records[:, 2] = num_rows
        records[:, 3] = num_waiting
        records[:, 4] = num_rows
        records[:, 5] = used_blocks
        self._num_steps += num

    def column(self, name: str) -> NDArray[np.float64]:
        """One column, (num_steps,) float64, a view."""
        return self._table[: self._num_steps, COLUMNS.index(name)]

    def _grow(self, num: int) -> None:
        size = max(2 * len(self._table), self._num_steps + num)
        table = np.empty((size, len(COLUMNS)))
        table[: self._num_steps] = self._table[: self._num_steps]
        self._table = table


class TokenGaps:
    """Times between consecutive tokens of a request, each with how often it occurred.

    All rows of a step usually share one gap, so a replay of millions of tokens keeps a few numbers per step. Gaps are
    kept in chunks; `_counts[i]` is how often each gap of chunk i occurred.
    """

    __slots__ = ("_counts", "_gaps")

    def __init__(self) -> None:
        self._gaps: list[NDArray[np.float64]] = []
        self._counts: list[int] = []

    def add(self, gaps: NDArray[np.float64]) -> None:
        """Add one gap for each of some rows."""
        if len(gaps) > 32 and (gaps == gaps[0]).all():
            self._gaps.append(gaps[:1])
            self._counts.append(len(gaps))
        else:
            self._gaps.append(gaps)
            self._counts.append(1)

    def add_steps(self, gaps: NDArray[np.float64], num_rows: int) -> None:
        """Add (k,) gaps, each of which all `num_rows` rows saw."""
        self._gaps.append(gaps)
        self._counts.append(num_rows)

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distinct gaps in ascending order and how often each occurred. O(n log n)."""
        if not self._gaps:
            return np.empty(0), np.empty(0, np.int64)
        values, positions = np.unique(np.concatenate(self._gaps), return_inverse=True)
        weights = np.repeat(self._counts, [len(gaps) for gaps in self._gaps])
        counts = np.bincount(positions, weights=weights).astype(np.int64)
        return values, counts
