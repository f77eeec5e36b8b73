"""Cascade attention: a prefix that many sequences share is read once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.merge import merge_states
from pagedkv.attention.op import paged_attention
from pagedkv.attention.partition import Int32s
from pagedkv.attention.step_plan import (
    AttentionPlan,
    check_block_tables,
    check_lengths,
    check_table_rows,
    on_host,
    plan,
)

__all__ = ["CascadePlan", "cascade_attention", "plan_cascade"]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One level: the tensors that `paged_attention` takes, and their plan."""

    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    plan: AttentionPlan


@dataclass(frozen=True, slots=True, eq=False)
class CascadePlan:
    """The plan of one step, made by `plan_cascade`: where the shared prefix lies, and what each sequence has after it.

    prefix: all query tokens as one sequence over the shared tokens; None if there are no tokens to share or to ask
    suffix: each sequence without its shared blocks
    """

    prefix: _Part | None
    suffix: _Part


def plan_cascade(
    block_tables: Int32s | Tensor,
    seq_lens: Int32s | Tensor,
    query_start_loc: Int32s | Tensor,
    *,
    num_shared_tokens: int,
    block_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    num_blocks: int | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> CascadePlan:
    """Plan a step in which all sequences start with the same blocks: once per step, for all layers that look alike.

    block_tables, seq_lens, query_start_loc: as in `paged_attention`, the shared blocks and tokens included, best as numpy
                       arrays, which the host has anyway. Rows of sequences without query tokens may hold anything
    num_shared_tokens: a multiple of block_size; no query token may stand among them
    num_blocks:        of the cache, so that table entries are checked; None to switch that check off

    Raises AttentionArgumentError if the sequences do not share that much, and as `plan` does.
    O(seqs * max_blocks + tasks).
    """
    tables = on_host("block_tables", block_tables, 2)
    lengths, starts = on_host("seq_lens", seq_lens, 1), on_host("query_start_loc", query_start_loc, 1)
    if block_size < 1:
        raise AttentionArgumentError(f"block_size must be at least 1, found {block_size}")
    if num_shared_tokens < 0 or num_shared_tokens % block_size:
        raise AttentionArgumentError(
            f"num_shared_tokens must be a multiple of block_size ({block_size}), found {num_shared_tokens}"
        )
    # Whole sequences are checked: cut, they could look right by accident.
    check_lengths(lengths, starts, None)
    check_table_rows(tables, lengths)
    if num_blocks is not None:
        check_block_tables(tables, lengths, starts, num_blocks=num_blocks, block_size=block_size, window_left=-1)
    options: dict[str, Any] = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "device": device,
        "backend": backend,
    }
    num_shared = num_shared_tokens // block_size
    is_asking = np.diff(starts) > 0
    if num_shared:
        _check_shared(tables, lengths - np.diff(starts) * causal, is_asking, num_shared, num_shared_tokens)
    own_tables = np.ascontiguousarray(tables[:, num_shared:])
    own_lens = np.maximum(lengths - np.int32(num_shared_tokens), 0)
    suffix = _part(own_tables, own_lens, starts, plan(own_lens, starts, causal=causal, **options), device)
    if not num_shared or not is_asking.any():
        return CascadePlan(None, suffix)
    shared = tables[int(is_asking.argmax())][None, :num_shared]
    one_len, one_start = np.array([num_shared_tokens], np.int32), np.array([0, starts[-1]], np.int32)
    # Every query token comes after every shared one, so nothing is hidden from it.
    prefix = _part(shared, one_len, one_start, plan(one_len, one_start, causal=False, **options), device)
    return CascadePlan(prefix, suffix)


def cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: CascadePlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `paged_attention` computes, with the shared prefix read once instead of once per sequence.

    Arguments, returns and errors as there. There is neither a window nor ALiBi: both need a query's distance from the
    shared keys, which the one sequence that stands for all of them has not. A sink counts once, after the shared tokens.
    Results of the two parts are rounded to the query's dtype before they are merged.

    O(tokens * keys seen) like `paged_attention`, but reads shared_tokens + sum(own tokens) keys, not sum(all tokens).

    Source: Ye et al., "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding", 2024.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "k_scale": k_scale, "v_scale": v_scale}

    def attend(part: _Part, **own: Any) -> tuple[Tensor, Tensor]:
        lengths = (part.block_tables, part.seq_lens, part.query_start_loc)
        own |= options | {"causal": part.plan.causal, "plan": part.plan, "return_lse": True}
        partial, lse = paged_attention(query, key_cache, value_cache, *lengths, **own)
        return partial, lse

    # The suffix last: it is the one that checks `out` before it writes there.
    shared = None if plan.prefix is None else attend(plan.prefix)
    state = attend(plan.suffix, sinks=sinks, tree_mask=tree_mask, out=out)
    if shared is not None:
        merged, lse = merge_states(*state, *shared)
        state = state[0].copy_(merged), lse
    return state if return_lse else state[0]


def _part(
    tables: Int32s, seq_lens: Int32s, query_start_loc: Int32s, part_plan: AttentionPlan, device: torch.device | str
) -> _Part:
    def on_device(values: Int32s) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return _Part(on_device(tables), on_device(seq_lens), on_device(query_start_loc), part_plan)


def _check_shared(
    tables: Int32s, num_seen_by_all: Int32s, is_asking: NDArray[np.bool_], num_shared: int, num_shared_tokens: int
) -> None:
    """Raise AttentionArgumentError unless all that ask see all of the shared tokens, in the same blocks."""
    is_short = is_asking & (num_seen_by_all < num_shared_tokens)
    if is_short.any():
        seq_idx = int(is_short.argmax())
        raise AttentionArgumentError(
            f"sequence {seq_idx} has {int(num_seen_by_all[seq_idx])} tokens before its query tokens, "
            f"fewer than the {num_shared_tokens} shared ones"
        )
    if tables.shape[1] < num_shared:
        raise AttentionArgumentError(f"{num_shared} blocks are shared, but block_tables has {tables.shape[1]} columns")
    shared = tables[is_asking, :num_shared]
    differs = (shared != shared[:1]).any(1)
    if differs.any():
        seq_idx = int(is_asking.nonzero()[0][differs.argmax()])
        raise AttentionArgumentError(
            f"sequence {seq_idx} does not start with the same {num_shared} blocks as the first"
        )
