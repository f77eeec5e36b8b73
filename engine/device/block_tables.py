"""The device's copy of the scheduler's block tables, kept up to date entry by entry."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import Int32s, Int64s, Rows, packed_runs
from pagedkv.engine.transfers import sent
from pagedkv.scheduler import StepPlan

__all__ = ["DeviceBlockTables"]


class DeviceBlockTables:
    """A mirror of `scheduler.block_tables` on the device; `update` it with every plan, before the step reads it.

    After `update(plan, ...)`, row r of the plan holds in its first ceil(seq_len / block_size) entries what the scheduler's
    table holds there. Entries behind them, and rows that are not in the plan, may be stale.

    Which entries changed is found by comparing with a shadow, the host's record of what the device has. It need not be
    compared whole: of a row that was in an earlier step and was not seated anew, blocks that are full never change. So a
    steady decode step compares one entry for each row, and sends those few of them that began a block. If a plan was
    passed over (a step that failed before it got here), every row of the next one is compared from its first entry.

    The mirror and the shadow belong to this object. All device work is put on the stream that is current in `update` and
    `gather`, which must be the one the steps run on: then an update waits for the steps before it that still read, and
    nothing else needs synchronising. The host never waits.
    """

    __slots__ = ("_next_step", "_num_sent", "_shadow", "block_size", "device", "tables")

    def __init__(self, block_size: int, device: torch.device | str) -> None:
        self.block_size = block_size
        self.device = torch.device(device)
        self.tables: Tensor = torch.zeros((0, 0), dtype=torch.int32, device=self.device)
        """(rows, width) int32 on the device; another tensor once the scheduler's table has grown."""
        self._shadow: Int32s = np.zeros((0, 0), np.int32)
        self._num_sent: Int64s = np.zeros(0, np.int64)
        """(rows,) leading entries that the device is sure to have, unless the row is seated anew."""
        self._next_step = 0

    def update(self, plan: StepPlan, block_tables: Int32s) -> int:
        """Bring the plan's rows up to date; returns how many entries were sent, 16 bytes each, in one transfer if any.

        `block_tables` are the scheduler's, (rows, width), at the time of the plan. O(rows), and O(blocks) for rows that were
        seated in this step.
        """
        self._reserve(*block_tables.shape)
        if plan.step != self._next_step:
            self._num_sent[:] = 0
        elif plan.admitted:
            self._num_sent[[seat.row for seat in plan.admitted]] = 0
        rows, block_size = plan.rows, self.block_size
        stops = -(-plan.seq_lens.astype(np.int64) // block_size)
        firsts = np.minimum(self._num_sent[rows], plan.starts // block_size)
        counts = stops - firsts
        owners, columns = rows.repeat(counts), packed_runs(firsts, counts)
        entries = block_tables[owners, columns]
        changed = (entries != self._shadow[owners, columns]).nonzero()[0]
        if len(changed):
            self._send(owners[changed], columns[changed], entries[changed])
        self._num_sent[rows] = stops
        self._next_step = plan.step + 1
        return len(changed)

    def gather(self, rows: Rows | Tensor, width: int) -> Tensor:
        """The first `width` entries of these rows, (len(rows), width) int32 on the device, a copy.

        `rows` as a tensor is on the device already; an array is sent, 8 bytes a row.
        """
        indices = rows if isinstance(rows, Tensor) else sent(rows, self.device)
        return self.tables[:, :width].index_select(0, indices)

    def _send(self, rows: Rows, columns: Int64s, entries: Int32s) -> None:
        places = sent(np.stack((rows * self.tables.shape[1] + columns, entries.astype(np.int64))), self.device)
        self.tables.view(-1).index_copy_(0, places[0], places[1].to(torch.int32))
        self._shadow[rows, columns] = entries

    def _reserve(self, num_rows: int, width: int) -> None:
        """Grow to the scheduler's size. What was sent stays; new entries are zero on both sides."""
        old_rows, old_width = self._shadow.shape
        if num_rows <= old_rows and width <= old_width:
            return
        shape = max(num_rows, old_rows), max(width, old_width)
        tables = torch.zeros(shape, dtype=torch.int32, device=self.device)
        tables[:old_rows, :old_width] = self.tables
        shadow = np.zeros(shape, np.int32)
        shadow[:old_rows, :old_width] = self._shadow
        num_sent = np.zeros(shape[0], np.int64)
        num_sent[:old_rows] = self._num_sent
        self.tables, self._shadow, self._num_sent = tables, shadow, num_sent
