"""The operators as torch knows them: `torch.ops.pagedkv.paged_attention` and `torch.ops.pagedkv.write_kv`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import profiler
from torch.compiler import is_compiling

from pagedkv.attention.backends import backend_named
from pagedkv.attention.call import AttentionCall, WriteCall
from pagedkv.attention.checks import check_tree_mask
from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.partition import PlanCounts, make_plan
from pagedkv.attention.step_plan import check_block_tables, check_lengths

__all__ = ["is_watched"]

# `torch.library.custom_op` would do the same with 25 times the overhead per call (130 us against 5 us, measured with
# torch 2.13 on this signature), which a step pays once per layer. Schema and fake implementation are the same.
_LIBRARY = torch.library.Library("pagedkv", "DEF")
_LIBRARY.define(
    "paged_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor query, Tensor key_cache, Tensor value_cache, "
    "Tensor block_tables, Tensor seq_lens, Tensor query_start_loc, float scale, bool causal, int window_left, "
    "int window_right, float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? tree_mask, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? tasks, Tensor? merges, SymInt[] counts, str backend) -> ()"
)
_LIBRARY.define(
    "write_kv(Tensor key, Tensor? value, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor slot_mapping, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, bool check_slots, str backend) -> ()"
)


def _run_attention(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    tree_mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tasks: Tensor | None,
    merges: Tensor | None,
    counts: list[int],
    backend: str,
) -> None:
    if tasks is None or merges is None:
        lengths, starts = seq_lens.numpy(force=True), query_start_loc.numpy(force=True)
        max_query_len = check_lengths(lengths, starts, query.shape[0])
        if tree_mask is not None:
            check_tree_mask(tree_mask, max_query_len)
        check_block_tables(
            block_tables.numpy(force=True),
            lengths,
            starts,
            num_blocks=key_cache.shape[0],
            block_size=key_cache.shape[1],
            window_left=window_left,
        )
        host_tasks, host_merges, made = make_plan(
            lengths,
            starts,
            backend_named(backend).partition(query.shape[1], key_cache.shape[2], query.device),
            heads_per_kv_head=query.shape[1] // key_cache.shape[2],
            causal=causal,
            window=(window_left, window_right),
        )
        tasks, merges = torch.from_numpy(host_tasks).to(query.device), torch.from_numpy(host_merges).to(query.device)
        counts = made.as_list()
    backend_named(backend).attend(
        AttentionCall(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            scale=scale,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            tree_mask=tree_mask,
            k_scale=k_scale,
            v_scale=v_scale,
            tasks=tasks,
            merges=merges,
            counts=PlanCounts(*counts),
            out=out,
            lse=lse,
        )
    )


def _run_write(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    check_slots: bool,
    backend: str,
) -> None:
    if check_slots and slot_mapping.numel():
        num_slots = key_cache.shape[0] * key_cache.shape[1]
        lowest, highest = (bound.item() for bound in torch.aminmax(slot_mapping))
        if lowest < -1 or highest >= num_slots:
            raise AttentionArgumentError(f"slot_mapping must be in -1..{num_slots - 1}, found {lowest}..{highest}")
    backend_named(backend).write(WriteCall(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale))


def is_watched() -> bool:
    """Whether a compiler, a dispatch mode or the profiler follows operators here, so that each must go through torch."""
    # By names of this module: each that is looked up in a module of torch's comes from memory when caches are cold.
    return is_compiling() or _len_torch_dispatch_stack() > 0 or profiler._is_profiler_enabled


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("paged_attention", _run_attention, _device)
    _LIBRARY.impl("write_kv", _run_write, _device)


@torch.library.register_fake("pagedkv::paged_attention")
def _fake_attention(*_: object) -> None:
    """Shapes of what is written are those of `out` and `lse`: there is nothing to compute."""


@torch.library.register_fake("pagedkv::write_kv")
def _fake_write(*_: object) -> None:
    """Writes in place: there is nothing to allocate."""
