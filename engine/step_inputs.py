"""The tensors of one step, made once from the scheduler's plan and read by every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.arrays import Int32s, Int64s
from pagedkv.attention import AttentionPlan, order_by_prefix, shared_with_previous
from pagedkv.attention import plan as plan_attention
from pagedkv.engine.transfers import staged
from pagedkv.scheduler import StepPlan

__all__ = ["StepInputs"]

Window = tuple[int, int] | None
PlanKind = tuple[int, int, Window, bool]
"""Query heads, KV heads, window, and whether prefixes may be shared."""


def _on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    # `to` takes half a microsecond even where there is nothing to do, and a step has seven tensors.
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else staged(tensor, device).to(device, non_blocking=True)


class StepInputs:
    """A packed step on the device.

    token_ids, positions: (1, tokens) int64, as a model takes them
    slot_mapping:         (tokens,) int64
    block_tables:         (rows, width) int32
    seq_lens:             (rows,) int32
    query_start_loc:      (rows + 1,) int32
    logit_indices:        (logits,) int64: packed positions whose logits are wanted
    """

    __slots__ = (
        "_lengths",
        "_plans",
        "_shared",
        "_starts",
        "block_tables",
        "logit_indices",
        "positions",
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
        "token_ids",
    )

    def __init__(
        self,
        *,
        token_ids: Int32s,
        positions: Int64s,
        slot_mapping: Int64s,
        block_tables: Int32s | Tensor,
        seq_lens: Int32s,
        query_start_loc: Int32s,
        logit_indices: Int64s,
        device: torch.device,
    ) -> None:
        self._lengths = seq_lens
        self._starts = query_start_loc
        self._shared: Int32s | None = None
        self._plans: dict[PlanKind, AttentionPlan] = {}
        self.token_ids = _on_device(token_ids.astype(np.int64)[None], device)
        self.positions = _on_device(positions[None], device)
        self.slot_mapping = _on_device(slot_mapping, device)
        self.block_tables = block_tables if isinstance(block_tables, Tensor) else _on_device(block_tables, device)
        self.seq_lens = _on_device(self._lengths, device)
        self.query_start_loc = _on_device(query_start_loc, device)
        self.logit_indices = _on_device(logit_indices, device)

    @classmethod
    def of_plan(
        cls, plan: StepPlan, block_tables: Int32s | Tensor, device: torch.device, block_size: int | None = None
    ) -> StepInputs:
        """The whole step. `block_tables` are those of the plan's rows, (len(plan.rows), width), on the host or the device.

        With a `block_size`, rows of a decode step that start with the same blocks are put next to each other, so that
        attention can read these once; `logit_indices` say where each went.
        """
        if block_size is not None and isinstance(block_tables, np.ndarray) and plan.is_decode:
            order = order_by_prefix(block_tables)
            if order is not None:
                return cls._of_ordered(plan, order, block_tables[order], device, block_size)
        return cls(
            token_ids=plan.token_ids,
            positions=plan.positions,
            slot_mapping=plan.slot_mapping,
            block_tables=block_tables,
            seq_lens=plan.seq_lens,
            query_start_loc=plan.query_start_loc,
            logit_indices=plan.logit_indices,
            device=device,
        )

    @classmethod
    def _of_ordered(
        cls, plan: StepPlan, order: Int64s, block_tables: Int32s, device: torch.device, block_size: int
    ) -> StepInputs:
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        inputs = cls(
            token_ids=plan.token_ids[order],
            positions=plan.positions[order],
            slot_mapping=plan.slot_mapping[order],
            block_tables=block_tables,
            seq_lens=plan.seq_lens[order],
            query_start_loc=plan.query_start_loc,
            logit_indices=places[plan.logit_indices],
            device=device,
        )
        inputs._shared = shared_with_previous(block_tables, inputs._lengths, inputs._starts, block_size)
        return inputs

    @classmethod
    def of_row(cls, plan: StepPlan, idx: int, block_tables: Int32s, device: torch.device) -> StepInputs:
        """The `idx`-th row of the step alone, with the logits of its last token."""
        start, stop = plan.query_start_loc[idx : idx + 2].tolist()
        tokens = slice(start, stop)
        return cls(
            token_ids=plan.token_ids[tokens],
            positions=plan.positions[tokens],
            slot_mapping=plan.slot_mapping[tokens],
            block_tables=block_tables[plan.rows[idx : idx + 1]],
            seq_lens=plan.seq_lens[idx : idx + 1],
            query_start_loc=np.array([0, stop - start], np.int32),
            logit_indices=np.array([stop - start - 1]),
            device=device,
        )

    def plan_for(
        self, num_q_heads: int, num_kv_heads: int, window: Window, *, may_share: bool = False
    ) -> AttentionPlan:
        """The attention plan that layers of these heads and this window share; made when the first of them asks.

        `may_share`: whether prefixes may be read once for several rows, which ALiBi does not allow.
        """
        key = (num_q_heads, num_kv_heads, window, may_share)
        made = self._plans.get(key)
        if made is None:
            made = self._plans[key] = plan_attention(
                self._lengths,
                self._starts,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                window=window,
                device=self.token_ids.device,
                shared=self._shared if may_share else None,
            )
        return made

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.token_ids.device
