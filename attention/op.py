"""The two operations: checks, the choice of a backend, and the call."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.backends import KnownWrite, pick_backend
from pagedkv.attention.call import AttentionCall, WriteCall
from pagedkv.attention.checks import attention_features, check_tree_mask, check_write, checked_window
from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.registration import is_watched
from pagedkv.attention.step_plan import AttentionPlan

__all__ = ["paged_attention", "write_kv"]

# With the overload named, torch need not look for it at each call.
_ATTEND = torch.ops.pagedkv.paged_attention.default
_WRITE = torch.ops.pagedkv.write_kv.default
# The last write that was checked: those of a step's layers look alike.
_known_write: KnownWrite | None = None
NUMBERS = (float, int, np.floating)


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    tree_mask: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    plan: AttentionPlan | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    tree_mask: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
    plan: AttentionPlan | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a ragged batch over keys and values that are read through block tables.

    Decodes and prefill chunks with a cached prefix stand in one call. Keys and values of the query tokens must be in
    the cache already. A query sees keys 0..p of its sequence (`causal`), where the last query token of a sequence
    stands at its last position, p = seq_len - 1. Queries that see no key get zeros and an LSE of -inf. For inference only:
    results have no gradient, whatever `requires_grad` says.

    query:           (tokens, q_heads, head_dim), the sequences' tokens one after the other
    key_cache:       (blocks, block_size, kv_heads, head_dim), any strides with contiguous heads: NHD and HND, which a
                     processor reads 1.2 to 1.5 times as fast
    value_cache:     the same with value_dim; may be a view of key_cache (MLA: key_cache[..., :512])
    block_tables:    (seqs, max_blocks) int32; entries that no query sees may hold anything
    seq_lens:        (seqs,) int32: keys of each sequence, its query tokens included
    query_start_loc: (seqs + 1,) int32: where each sequence's query tokens start; 0 first, tokens last
    scale:           of the scores; 1 / sqrt(head_dim) if None
    window:          keys seen (before, after) one's own position, None for all; the model card's "sliding window of W"
                     is (W - 1, 0)
    softcap:         c: scores become c * tanh(score / c), before biases
    sinks:           (q_heads,) float32: a logit per head that joins the softmax's denominator, and the LSE
    alibi_slopes:    (q_heads,) float32: score - slope * |query position - key position|
    tree_mask:       (tokens, words) int32, see `pack_tree_mask`: which of its sequence's query tokens a query sees
                     beside all keys before them; not together with window or alibi_slopes, for a token's depth in the
                     tree is not its place
    k_scale, v_scale: scales of quantised caches, see `CacheFormat`
    out:             (tokens, q_heads, value_dim), written and returned; not an expanded tensor
    plan:            of this step, by `plan`, for the same sequences, causal and window. It has checked lengths and block
                     tables; without it they are checked here, which on a GPU waits for the device. That it is of these very
                     lengths is checked on the CPU only
    backend:         its name; None picks the first that can do all of it, see `backend_info`

    Returns out (tokens, q_heads, value_dim) in the query's dtype, and with `return_lse` also the natural logarithm of the
    softmax's denominator (tokens, q_heads), float32 (float64 for float64 queries). Raises AttentionArgumentError or
    BackendUnsupportedError before anything is written. O(tokens * keys seen).
    """
    tensors = (query, key_cache, value_cache, block_tables, seq_lens, query_start_loc)
    optional = (sinks, alibi_slopes, tree_mask, k_scale, v_scale)
    asked = (scale, causal, window, softcap, backend, return_lse)
    if plan is not None and not is_watched() and plan.known is not None:
        result = plan.known.attend((*tensors, *optional), asked, out)
        if result is not None:
            return result
    return _attend(tensors, optional, asked, out, plan)


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    optional: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    asked: tuple[Any, bool, Any, Any, str | None, bool],
    out: Tensor | None,
    plan: AttentionPlan | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check everything, pick a backend, and call the operator; then let the plan know the call."""
    query, key_cache, _, _, seq_lens, query_start_loc = tensors
    sinks, alibi_slopes, tree_mask, k_scale, v_scale = optional
    scale, causal, window, softcap, backend, return_lse = asked
    features = attention_features(
        *tensors,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        tree_mask=tree_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    left, right = checked_window(window)
    if tree_mask is not None and (alibi_slopes is not None or window is not None or not causal):
        raise AttentionArgumentError("tree_mask needs causal=True and goes with neither window nor alibi_slopes")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[2])
    elif not isinstance(scale, NUMBERS) or not math.isfinite(scale):
        raise AttentionArgumentError(f"scale must be finite, or None, found {scale!r}")
    if softcap is not None and not (isinstance(softcap, NUMBERS) and 0 < softcap < math.inf):
        raise AttentionArgumentError(f"softcap must be above 0 and finite, or None, found {softcap!r}")
    if plan is not None:
        _check_plan(plan, query, key_cache, (seq_lens, query_start_loc), causal, (left, right), backend)
        if plan.shares_prefixes and (tree_mask is not None or alibi_slopes is not None):
            raise AttentionArgumentError("a plan with shared prefixes goes with neither tree_mask nor alibi_slopes")
        if tree_mask is not None:
            check_tree_mask(tree_mask, plan.max_query_len)
        backend = plan.backend
    chosen = pick_backend(features, backend)
    if out is None:
        out = query.new_empty(query.shape[0], features.num_q_heads, features.value_dim)
    lse = None
    if return_lse:
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(query.shape[:2], dtype=lse_dtype)
    tasks, merges, counts = (None, None, []) if plan is None else (plan.tasks, plan.merges, plan.counts.as_list())
    numbers = (float(scale), causal, left, right, float(softcap or 0.0))
    _ATTEND(out, lse, *tensors, *numbers, *optional, tasks, merges, counts, chosen.name)
    if plan is not None and plan.made_for is not None and not is_watched():
        call = AttentionCall(*tensors, *numbers, *optional, plan.tasks, plan.merges, plan.counts, out, lse)
        plan.known = chosen.know_attention(call, asked, plan.made_for)
    return out if lse is None else (out, lse)


def _check_plan(
    plan: AttentionPlan,
    query: Tensor,
    key_cache: Tensor,
    lengths: tuple[Tensor, Tensor],
    causal: bool,
    window: tuple[int, int],
    backend: str | None,
) -> None:
    made_for = (plan.num_seqs, plan.num_tokens, plan.heads, plan.causal, plan.window)
    asked = (lengths[0].shape[0], query.shape[0], (query.shape[1], key_cache.shape[2]), causal, window)
    if made_for != asked:
        names = ("sequences", "query tokens", "(q_heads, kv_heads)", "causal", "window")
        wrong = [
            f"{n}: {a} in the plan, {b} in the call" for n, a, b in zip(names, made_for, asked, strict=True) if a != b
        ]
        raise AttentionArgumentError("the plan is of another step: " + "; ".join(wrong))
    if plan.tasks.device != query.device:
        raise AttentionArgumentError(f"the plan is on {plan.tasks.device}, query on {query.device}")
    if backend is not None and backend != plan.backend:
        raise AttentionArgumentError(f"the plan was made for the {plan.backend} backend, asked is {backend}")
    # On a GPU, reading a length would wait for the device. What a compiler traces has no values.
    if plan.made_for is not None and type(lengths[0]) is Tensor and not torch.compiler.is_compiling():
        for name, planned, given in zip(("seq_lens", "query_start_loc"), plan.made_for, lengths, strict=True):
            if not torch.equal(planned, given):
                raise AttentionArgumentError(f"the plan is of another step: it was made for other {name}")


def write_kv(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    check_slots: bool = True,
    backend: str | None = None,
) -> None:
    """Scatter new keys and values into the paged cache, in place, quantising them where the cache is quantised.

    key, value:   (tokens, kv_heads, head_dim) and (tokens, kv_heads, value_dim); value and value_cache are None
                  together where one cache holds both (the latent of MLA)
    key_cache, value_cache: as in `paged_attention`; plain floats of the same dtype, or a quantised format
    slot_mapping: (tokens,) int64; slot = block_id * block_size + offset; -1 skips. No slot may stand twice
    k_scale, v_scale: of a quantised cache: read for fp8, written for int8 and int4, see `CacheFormat`
    check_slots:  whether slots are checked to lie in the cache, which on a GPU waits for the device

    Raises AttentionArgumentError or BackendUnsupportedError before anything is written. O(tokens * kv_heads * head_dim).
    """
    global _known_write
    may_be_known = not is_watched()
    call = WriteCall(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    if may_be_known and _known_write is not None and _known_write.write(call.operands(), backend):
        return
    features = check_write(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    chosen = pick_backend(features, backend, for_write=True)
    _WRITE(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, check_slots, chosen.name)
    if may_be_known:
        _known_write = chosen.know_write(call, backend)
