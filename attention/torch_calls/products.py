"""Attention of matrices that are there: by torch's kernel, or with scores made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.torch_calls.setup import Setup

__all__ = ["attend", "weights_of"]


def attend(
    call: AttentionCall,
    setup: Setup,
    query: Tensor,
    key_and_value: tuple[Tensor, Tensor],
    bias: Tensor | None,
    *,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of matrices (a, b, rows or keys, dim), the bias broadcast to (a, b, rows, keys): out and LSE."""
    key, value = key_and_value
    if bias is not None and call.tree_mask is not None:
        # A branch that nobody follows may never have been written: a NaN there outlives a weight of zero.
        is_unseen = (bias == -torch.inf).all(-2)[..., None]
        key, value = key.masked_fill(is_unseen, 0), value.masked_fill(is_unseen, 0)
    if setup.is_manual:
        return _attend_by_hand(call, query, key, value, bias)
    # The kernel wants one width for all three. More channels of zeros change no score, and are cut off the result.
    width = max(query.shape[3], value.shape[3])
    query, key, value = (
        x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3])) for x in (query, key, value)
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=call.scale
    )
    out = out[..., : setup.value_dim]
    if bias is not None:
        # The kernel says 0 for the LSE of a query that sees nothing.
        is_blind = (bias == -torch.inf).all(-1)
        out, lse = out.masked_fill(is_blind[..., None], 0), lse.masked_fill(is_blind, -torch.inf)
    return out, lse


def _attend_by_hand(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights, total, lse = weights_of(call, (query @ key.mT).mul_(call.scale), bias)
    return (weights @ value).div_(total), lse


def weights_of(call: AttentionCall, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the largest of a row 1, in the place of scores; what to divide their sums by (…, 1); and the LSE."""
    if call.softcap > 0:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if bias is not None:
        scores += bias
    highest = scores.amax(-1, keepdim=True)
    if bias is not None:
        # A query that sees nothing has weights of zero and lse = -inf.
        highest.masked_fill_(highest == -torch.inf, 0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (highest + total.log()).squeeze(-1)
    return weights, total if bias is None else total.masked_fill_(total == 0, 1), lse
