"""What one step has to do, in the aggregates that a cost model needs."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Count", "Seconds", "StepLoad"]

Count: TypeAlias = int | NDArray[np.int64]
"""One number for one step, or (k,) numbers for k steps."""

Seconds: TypeAlias = float | NDArray[np.float64]
"""A float for one step, or (k,) float64 for k steps."""


class StepLoad(NamedTuple):
    """The work of one step, summed over its rows; or of k steps at once.

    Each field is an int, or an int64 array of shape (k,) when k steps are costed together; ints and arrays
    broadcast. Nothing is checked here: the simulator builds one per step.

    num_rows:             rows that take part
    num_tokens:           tokens computed in this step
    num_sampled:          rows for which logits are computed
    num_context_tokens:   sum over rows of the context length after this step: the K/V entries that attention reads
    num_attention_pairs:  sum over rows of the query-key pairs under the causal mask: n * start + n * (n + 1) / 2
                          for n tokens computed from position `start` on
    num_copied_blocks:    blocks copied on the device (copy-on-write)
    num_swapped_in_blocks, num_swapped_out_blocks: blocks brought from, or sent to, host memory

    One row that prefills 3 tokens (1 + 2 + 3 pairs), and one that decodes its 5th (5 pairs):

    >>> load = StepLoad(num_rows=2, num_tokens=4, num_sampled=2, num_context_tokens=8, num_attention_pairs=11)
    >>> load.num_swapped_in_blocks
    0
    """

    num_rows: Count
    num_tokens: Count
    num_sampled: Count
    num_context_tokens: Count
    num_attention_pairs: Count
    num_copied_blocks: Count = 0
    num_swapped_in_blocks: Count = 0
    num_swapped_out_blocks: Count = 0
