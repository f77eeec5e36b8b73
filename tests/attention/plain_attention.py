"""Attention as anybody would write it in torch, all of it in the query's dtype: the measure of how exact is exact enough.

Nothing of `pagedkv.attention` is used, so that a mistake there cannot repeat itself here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from batches import Batch, one_thread
from caches import FP8
from torch import Tensor

__all__ = ["plain_attention"]


@lru_cache(maxsize=256)
@one_thread()
def plain_attention(batch: Batch) -> tuple[Tensor, Tensor]:
    """Output and LSE of `batch`: gather, dequantise, two matrix products and a softmax, each rounded to its dtype."""
    outs, lses = [], []
    start = 0
    for seq_idx, (num_queries, length) in enumerate(batch.lens):
        if num_queries:
            out, lse = _one_sequence(batch, seq_idx, start, num_queries, length)
            outs.append(out)
            lses.append(lse)
        start += num_queries
    if not outs:
        shape = (0, batch.num_q_heads)
        return torch.empty(*shape, batch.value_dim, dtype=batch.torch_dtype), torch.empty(
            shape, dtype=batch.torch_dtype
        )
    return torch.cat(outs), torch.cat(lses)


def _one_sequence(batch: Batch, seq_idx: int, start: int, num_queries: int, length: int) -> tuple[Tensor, Tensor]:
    tensors = batch.tensors()
    dtype = batch.torch_dtype
    query = tensors["query"][start : start + num_queries].transpose(0, 1)
    left, right = batch.window or (None, None)
    first_key = 0 if left is None else max(length - num_queries - left, 0)
    key_positions = torch.arange(first_key, max(length, first_key))
    places = (
        tensors["block_tables"][seq_idx].long()[key_positions // batch.block_size],
        key_positions % batch.block_size,
    )
    keys = _numbers(batch, tensors["key_cache"][places], tensors.get("k_scale"), places).repeat_interleave(
        batch.group, 1
    )
    values = _numbers(batch, tensors["value_cache"][places], tensors.get("v_scale"), places)
    values = values.repeat_interleave(batch.group, 1)
    scale = batch.head_dim**-0.5 if batch.scale is None else batch.scale
    scores = query @ keys.permute(1, 2, 0) * scale
    if batch.softcap is not None:
        scores = torch.tanh(scores / batch.softcap) * batch.softcap
    distance = key_positions[None] - torch.arange(length - num_queries, length)[:, None]
    if batch.has_alibi:
        scores = scores - tensors["alibi_slopes"].to(dtype)[:, None, None] * distance.abs().to(dtype)
    is_hidden = torch.zeros_like(distance, dtype=torch.bool)
    if batch.causal:
        is_hidden |= distance > 0
    if left is not None:
        is_hidden |= distance < -left
    if right is not None:
        is_hidden |= distance > right
    if batch.has_tree_mask:
        is_hidden |= _tree_hidden(tensors["tree_mask"][start : start + num_queries], key_positions, num_queries, length)
    scores = scores.masked_fill(is_hidden, -torch.inf)
    sinks = tensors["sinks"] if batch.has_sinks else torch.full((batch.num_q_heads,), -torch.inf)
    scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)), -1)
    weights = torch.softmax(scores, -1)[..., :-1].nan_to_num(0)
    # A value that nobody sees may be NaN, which a weight of zero does not keep out.
    out = weights @ values.masked_fill(is_hidden.all(0)[:, None, None], 0).transpose(0, 1)
    return out.transpose(0, 1), torch.logsumexp(scores, -1).transpose(0, 1)


def _tree_hidden(words: Tensor, key_positions: Tensor, num_queries: int, length: int) -> Tensor:
    hidden = torch.zeros(num_queries, len(key_positions), dtype=torch.bool)
    for column, position in enumerate(key_positions.tolist()):
        token = position - (length - num_queries)
        if token >= 0:
            hidden[:, column] = (words[:, token // 32] >> (token % 32)) & 1 == 0
    return hidden


def _numbers(batch: Batch, codes: Tensor, scale: Tensor | None, places: tuple[Tensor, Tensor]) -> Tensor:
    """What the codes (n, kv_heads, ...) stand for, in the batch's dtype."""
    dtype = batch.torch_dtype
    if batch.cache == "int4":
        assert scale is not None
        numbers = torch.empty(*codes.shape[:-1], codes.shape[-1] * 2, dtype=dtype)
        numbers[..., 0::2], numbers[..., 1::2] = (codes % 16).to(dtype), (codes // 16).to(dtype)
        step, minimum = (
            part.to(dtype).repeat_interleave(numbers.shape[-1] // scale.shape[3], -1)
            for part in scale[places].unbind(-1)
        )
        return numbers * step + minimum
    numbers = codes.to(dtype)
    if batch.cache == "int8":
        assert scale is not None
        return numbers * scale[places].to(dtype)[..., None]
    if batch.cache in FP8 and scale is not None:
        return numbers * scale.to(dtype).expand(batch.num_kv_heads)[:, None]
    return numbers
