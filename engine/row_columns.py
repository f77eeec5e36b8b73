"""What the engine knows of each of the scheduler's rows, in columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s
from pagedkv.engine.live_requests import LiveSample

__all__ = ["RowColumns"]


class RowColumns:
    """Columns by row; a row's entries hold for the sample that was seated there last.

    samples:    (rows,) list, the live sample, None once that has ended. A list, and not an array of objects: Python's
                garbage collector does not look into these, and a sample refers to whoever waits for it
    num_prompt: (rows,) int64, prompt tokens of its request
    listens:    (rows,) bool, whether its tokens are looked at as they come
    """

    __slots__ = ("listens", "num_prompt", "samples")

    def __init__(self, num_rows: int = 64) -> None:
        self.samples: list[LiveSample | None] = [None] * num_rows
        self.num_prompt: Int64s = np.zeros(num_rows, np.int64)
        self.listens: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)

    def seat(self, row: int, sample: LiveSample) -> None:
        """A sample was given this row. O(1) amortised."""
        if row >= len(self.samples):
            self._grow(row + 1)
        self.release(sample)
        self.samples[row] = sample
        sample.row = row
        self.num_prompt[row] = len(sample.request.prompt_token_ids)
        self.listens[row] = sample.listens

    def release(self, sample: LiveSample) -> None:
        """A sample has ended, or gets another row: the row that it had, if any, knows it no more. O(1)."""
        row = sample.row
        if row is not None and self.samples[row] is sample:  # A preempted one may have lost it to another.
            self.samples[row] = None
            self.listens[row] = False

    def _grow(self, num_rows: int) -> None:
        more = max(num_rows, 2 * len(self.samples)) - len(self.samples)
        self.samples += [None] * more
        self.num_prompt = np.concatenate((self.num_prompt, np.zeros(more, np.int64)))
        self.listens = np.concatenate((self.listens, np.zeros(more, np.bool_)))
