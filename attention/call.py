"""One call, checked and complete: what every backend is handed, and what it is chosen by.

These are made once per layer and step, so they are not frozen: that alone takes three times as long, 3 us for the
fields of an `AttentionCall`. Nobody writes to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention.formats import CacheFormat
from pagedkv.attention.partition import PlanCounts

__all__ = ["AttentionCall", "Features", "WriteCall"]


@dataclass(slots=True)
class Features:
    """What a call asks of a backend, known from shapes and dtypes alone. `dtype`: of the query, or of what is written."""

    device: torch.device
    dtype: torch.dtype
    cache_format: CacheFormat
    block_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    has_alibi: bool = False
    has_tree_mask: bool = False


@dataclass(slots=True, eq=False)
class AttentionCall:
    """The tensors and numbers of one call. Shapes as `paged_attention` documents them.

    window_left, window_right: keys that a query sees before and after its own position, -1 for all of them
    softcap:  0 for none
    tasks, merges, counts: the parts of the `AttentionPlan`
    out, lse: are written; lse may be None
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    tree_mask: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    tasks: Tensor
    merges: Tensor
    counts: PlanCounts
    out: Tensor
    lse: Tensor | None

    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors that a caller gives, in the order in which kernels/known_calls.h has them."""
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.sinks,
            self.alibi_slopes,
            self.tree_mask,
            self.k_scale,
            self.v_scale,
        )


@dataclass(slots=True, eq=False)
class WriteCall:
    """The tensors of one write. Shapes as `write_kv` documents them; value and value_cache are both None for MLA."""

    key: Tensor
    value: Tensor | None
    key_cache: Tensor
    value_cache: Tensor | None
    slot_mapping: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def operands(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order in which kernels/known_calls.h has them."""
        return (
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.slot_mapping,
            self.k_scale,
            self.v_scale,
        )
