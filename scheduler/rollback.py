"""Taking back a step that was not carried out."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import BlockIds, Int64s, Rows
from pagedkv.plans import BlockCopies
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.running import RunningRows

__all__ = ["retract_step"]


def retract_step(
    rows: Rows,
    starts: Int64s,
    copies: BlockCopies,
    swapped_in: list[tuple[int, int]],
    *,
    memory: RowMemory,
    running: RunningRows,
) -> None:
    """Retract every row of a step to the tokens whose K/V is surely on the device, and forget the step's names.

    `starts` are where the rows stood before it; `swapped_in` holds (row, tokens that had not left the device). A token is
    lost if its slot was given in this step, if it lies in or behind a block that another row was to fill in this step, or
    in a block that was to be copied. O(rows + their blocks).
    """
    unwritten = memory.unname_step()
    copied = set(copies.targets.tolist())
    num_valid = dict(zip(rows.tolist(), starts.tolist(), strict=True))
    for row, num_kept in swapped_in:
        if row in num_valid:  # Otherwise its admission failed halfway, and it starts over.
            num_valid[row] = min(num_valid[row], num_kept)
    for row, num_tokens in num_valid.items():
        if running.samples[row] is not None:
            memory.retract(row, _num_written(memory, row, num_tokens, unwritten, copied))


def _num_written(memory: RowMemory, row: int, num_valid: int, unwritten: BlockIds, copied: set[int]) -> int:
    blocks = memory.sequences.blocks(row)
    # The block that the row itself went on to fill holds what it held before.
    missing = np.flatnonzero(np.isin(blocks[: num_valid // memory.block_size], unwritten))
    if len(missing):
        num_valid = min(num_valid, int(missing[0]) * memory.block_size)
    offset = num_valid % memory.block_size
    if offset and int(blocks[num_valid // memory.block_size]) in copied:
        num_valid -= offset
    return num_valid
