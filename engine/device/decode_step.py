"""The inputs of decode steps of one size, at addresses that stay: what a captured graph reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import cdiv
from pagedkv.attention import AttentionPlan
from pagedkv.attention import plan as plan_attention
from pagedkv.engine.device.block_tables import DeviceBlockTables
from pagedkv.engine.step_inputs import PlanKind, StepInputs, Window
from pagedkv.engine.transfers import staged
from pagedkv.scheduler import StepPlan

__all__ = ["DecodeStep"]

PADDING = -1
"""The position of a row that is not there: its sequence is 0 tokens long, and its slot is -1."""


class DecodeStep(StepInputs):
    """Steps of at most `size` rows with one token each, padded to `size`.

    `load` is done for each step by the host; `unpack` and the model's forward pass are what a graph holds. Sent are
    three numbers a row, and the attention plans; positions, lengths and slots are made of them on the device.

    A padding row computes token 0 at position 0 over no keys, whose attention is zero, and writes nothing: the op reads
    neither its block table nor the cache.

    It owns its columns and its plans; `block_tables` is a part of a buffer that steps of all sizes share, since only one of
    them runs at a time. All of it is written on the current stream, so after the step before has read it.
    """

    __slots__ = ("_block_size", "_columns", "_size")

    def __init__(self, block_tables: Tensor, block_size: int) -> None:
        """`block_tables`: (size, width) int32 on the device; longer tables than `width` must not be loaded."""
        size, device = block_tables.shape[0], block_tables.device
        self._size = size
        self._block_size = block_size
        self._columns = torch.zeros((3, size), dtype=torch.int32, device=device)
        """Token ids, positions, and rows of the device's block tables."""
        self._lengths = np.zeros(size, np.int32)
        self._starts = np.arange(size + 1, dtype=np.int32)
        self._plans: dict[PlanKind, AttentionPlan] = {}
        self.block_tables = block_tables
        self.query_start_loc = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.logit_indices = torch.arange(size, device=device)
        self.unpack()

    @property
    def size(self) -> int:
        """Rows, padding included."""
        return self._size

    def load(self, plan: StepPlan, tables: DeviceBlockTables) -> None:
        """Take the inputs of a plan of 1 to `size` rows, for which `tables` are up to date.

        O(size), and a plan of attention for each kind of layer. The host does not wait.
        """
        num_rows = plan.num_rows
        columns = np.zeros((3, self._size), np.int32)
        columns[1] = PADDING
        columns[0, :num_rows] = plan.token_ids
        columns[1, :num_rows] = plan.starts
        columns[2, :num_rows] = plan.rows
        self._lengths = columns[1] + 1
        self._columns.copy_(staged(torch.from_numpy(columns), self.device), non_blocking=True)
        for kind, made in self._plans.items():
            renewed = self._planned(kind, torch.device("cpu"), made.backend)
            tasks, merges = staged(renewed.tasks, self.device), staged(renewed.merges, self.device)
            made.take_over(replace(renewed, tasks=tasks, merges=merges))
        width = cdiv(int(self._lengths.max()), self._block_size)
        self.block_tables[:num_rows, :width] = tables.gather(self._columns[2, :num_rows], width)

    def unpack(self) -> None:
        """Make the tensors that model and layers read from those that were loaded: part of the graph, without a wait."""
        token_ids, positions = self._columns[0], self._columns[1]
        known = positions.clamp(min=0)
        block_ids = self.block_tables.gather(1, (known // self._block_size).long()[:, None])[:, 0].long()
        slots = block_ids * self._block_size + known % self._block_size
        self.token_ids = token_ids.long()[None]
        self.positions = known.long()[None]
        self.seq_lens = positions + 1
        # Not `torch.where`: it would bring the number to the device by a copy, which no capture allows.
        self.slot_mapping = slots.masked_fill_(positions < 0, -1)

    def plan_for(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        window: Window,
        *,
        may_share: bool = False,  # noqa: ARG002 - a graph's tasks are as many whatever rows share
    ) -> AttentionPlan:
        """The plan of layers of this kind, in tensors that stay; made when the first of them asks, in the warm-up."""
        kind = (num_q_heads, num_kv_heads, window, False)
        made = self._plans.get(kind)
        if made is None:
            made = self._plans[kind] = self._planned(kind, self.device, None)
        return made

    def _planned(self, kind: PlanKind, device: torch.device, backend: str | None) -> AttentionPlan:
        """A plan of the loaded lengths. On the host it is as the device's, whose number of processors is asked for."""
        num_q_heads, num_kv_heads, window, _ = kind
        return plan_attention(
            self._lengths,
            self._starts,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            window=window,
            device=device,
            backend=backend,
            fixed_size=True,
        )
