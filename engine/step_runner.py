"""Carries out a plan on the device: moves blocks, then computes, through a captured graph where there is one."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pagedkv.arrays import cdiv
from pagedkv.engine.device import CudaCapture, DecodeGraphs, DeviceBlockTables
from pagedkv.engine.model import PagedModel
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.scheduler import Scheduler, StepPlan
from pagedkv.storage import KVStorage

__all__ = ["StepRunner"]


class StepRunner:
    """The tensors' side of a step. On CUDA the block tables live on the device, and decode steps run as graphs."""

    __slots__ = ("_graphs", "_scheduler", "_tables", "model", "storage")

    def __init__(self, model: PagedModel, storage: KVStorage, scheduler: Scheduler, *, max_length: int | None) -> None:
        """`max_length` is that of a sequence, None if only the blocks limit it."""
        self.model = model
        self.storage = storage
        self._scheduler = scheduler
        self._tables: DeviceBlockTables | None = None
        self._graphs: DecodeGraphs | None = None
        if model.device.type == "cuda":
            widest = storage.num_blocks if max_length is None else cdiv(max_length, model.block_size)
            self._tables = DeviceBlockTables(model.block_size, model.device)
            self._graphs = DecodeGraphs(
                model,
                max_rows=scheduler.config.max_num_running,
                max_width=min(widest, storage.num_blocks),
                capture=CudaCapture(model.device),
            )

    def apply(self, plan: StepPlan) -> None:
        """Swap, copy and wipe blocks as planned. Most plans have none, and the storage checks what it is given."""
        wipes = self.storage.zero_on == "alloc" and len(plan.taken)
        if len(plan.swaps_out) or len(plan.copies) or len(plan.swaps_in) or wipes:
            self.storage.apply(plan)

    def compute(self, plan: StepPlan) -> Tensor | None:
        """Logits at `plan.logit_indices`, (logits, vocab), to be read before the next step; None if nothing is computed."""
        if not plan.num_rows:
            return None
        tables = self._scheduler.block_tables
        if self._graphs is not None and self._tables is not None:
            self._tables.update(plan, tables)
            logits = self._graphs.forward(plan, self._tables)
            if logits is not None:
                return logits
        width = cdiv(int(np.maximum.reduce(plan.seq_lens)), self.model.block_size)
        own = tables[:, :width][plan.rows] if self._tables is None else self._tables.gather(plan.rows, width)
        return self.model.forward(StepInputs.of_plan(plan, own, self.model.device, self.model.block_size))
