"""What the engine knows of each of the scheduler's rows, in columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s
from pagedkv.engine.live_requests import LiveSample

__all__ = ["RowColumns"]


class RowColumns:
    """Columns by row; a row's entries hold for the sample that was seated there last.

    samples:    (rows,) object, the live sample
    num_prompt: (rows,) int64, prompt tokens of its request
    listens:    (rows,) bool, whether its tokens are looked at as they come
    """

    __slots__ = ("listens", "num_prompt", "samples")

    def __init__(self, num_rows: int = 64) -> None:
        self.samples: NDArray[np.object_] = np.full(num_rows, None, object)
        self.num_prompt: Int64s = np.zeros(num_rows, np.int64)
        self.listens: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)

    def seat(self, row: int, sample: LiveSample) -> None:
        """A sample was given this row. O(1) amortised."""
        if row >= len(self.samples):
            self._grow(row + 1)
        self.samples[row] = sample
        self.num_prompt[row] = len(sample.request.prompt_token_ids)
        self.listens[row] = sample.listens

    def _grow(self, num_rows: int) -> None:
        more = max(num_rows, 2 * len(self.samples)) - len(self.samples)
        self.samples = np.concatenate((self.samples, np.full(more, None, object)))
        self.num_prompt = np.concatenate((self.num_prompt, np.zeros(more, np.int64)))
        self.listens = np.concatenate((self.listens, np.zeros(more, np.bool_)))
