"""The partial results of a query token's splits, put together."""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.attention.triton_kernels.numbers import log2_of, narrowed

__all__ = ["merge_splits"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["stride_merges"])
def merge_splits(
    out,
    lse,
    partial_out,
    partial_lse,
    merges,
    sinks,
    num_q_heads,
    stride_out_token,
    stride_out_head,
    stride_merges,
    VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """`PROGRAMS` programs share the (token, head) rows of one merge; each takes a row's splits `SPLITS` at a time.

    A merge without tokens is none, so a plan may be padded with zeros.
    """
    merge = merges + tl.program_id(0) // PROGRAMS
    first_token = tl.load(merge)
    num_tokens = tl.load(merge + stride_merges) - first_token
    first_partial = tl.load(merge + 2 * stride_merges)
    num_splits = tl.load(merge + 3 * stride_merges)
    channels = tl.arange(0, CHANNELS)
    for row in tl.range(tl.program_id(0) % PROGRAMS, num_tokens * num_q_heads, PROGRAMS):
        token = row // num_q_heads
        head = row % num_q_heads
        highest = -float("inf")
        if sinks is not None:
            highest = tl.load(sinks + head) * LOG2_E
        total = tl.where(highest == -float("inf"), 0.0, 1.0)
        sums = tl.zeros((CHANNELS,), tl.float32)
        for start in tl.range(0, num_splits, SPLITS):
            splits = start + tl.arange(0, SPLITS)
            exists = splits < num_splits
            places = (first_partial + splits * num_tokens + token).to(tl.int64) * num_q_heads + head
            heights = tl.load(partial_lse + places, mask=exists, other=-float("inf")) * LOG2_E
            new_highest = tl.maximum(highest, tl.max(heights, 0))
            base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            decay = tl.exp2(highest - base)
            weights = tl.exp2(heights - base)
            mask = exists[:, None] & (channels < VALUE_DIM)[None, :]
            parts = tl.load(partial_out + places[:, None] * VALUE_DIM + channels[None, :], mask=mask, other=0.0)
            total = total * decay + tl.sum(weights, 0)
            sums = sums * decay + tl.sum(weights[:, None] * parts, 0)
            highest = new_highest
        share = 1.0 / tl.where(total > 0, total, 1.0)
        out_token = (first_token + token).to(tl.int64)
        if lse is not None:
            tl.store(lse + out_token * num_q_heads + head, (highest + log2_of(total)) * LN_2)
        out_row = out + out_token * stride_out_token + head.to(tl.int64) * stride_out_head
        tl.store(out_row + channels, narrowed(sums * share, out.dtype.element_ty), mask=channels < VALUE_DIM)
