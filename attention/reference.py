"""Attention in plain torch, one sequence at a time, obvious over fast: what every other backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.formats import dequantize, quantize
from pagedkv.attention.partition import Partition

__all__ = ["ReferenceBackend", "visible_keys"]


class ReferenceBackend:
    """Any device, any dtype up to float64, every feature. It computes in float32, or in float64 for float64 queries."""

    name = "reference"

    def unavailable(self) -> str | None:
        """Never."""
        return None

    def runs_on(self, device_type: str) -> bool:
        """Everywhere but on meta tensors."""
        return device_type != "meta"

    def refuses(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def refuses_write(self, features: Features) -> str | None:
        """Nothing."""
        return None

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """One task per sequence: the reference does not read tasks."""
        return Partition(num_workers=1, max_decode_rows=0, query_tile=2**30, min_split=2**30)

    def know_attention(self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]) -> None:
        """Nothing: each call is checked."""

    def know_write(self, call: WriteCall, asked: str | None) -> None:
        """Nothing: each write is checked."""

    def describe(self) -> str:
        """The library it is written in."""
        return f"torch {torch.__version__}, one sequence at a time"

    @torch.no_grad()
    def attend(self, call: AttentionCall) -> None:
        """One sequence after the other: gather its keys and values, then softmax over all of them."""
        seq_lens = call.seq_lens.tolist()
        starts = call.query_start_loc.tolist()
        for seq_idx, length in enumerate(seq_lens):
            first, end = starts[seq_idx], starts[seq_idx + 1]
            if first < end:
                _attend_one(call, seq_idx, first, end, length)

    @torch.no_grad()
    def write(self, call: WriteCall) -> None:
        """Scatter, token by token in one indexed assignment per cache."""
        _write_one(call.key, call.key_cache, call.slot_mapping, call.k_scale)
        if call.value is not None and call.value_cache is not None:
            _write_one(call.value, call.value_cache, call.slot_mapping, call.v_scale)


def visible_keys(
    num_queries: int, length: int, *, causal: bool, window: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Which keys each query sees, (num_queries, length) bool; the last query stands at the last position.

    >>> visible_keys(2, 4, causal=True, window=(1, -1)).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    queries = torch.arange(length - num_queries, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    left, right = window
    visible = torch.ones(num_queries, length, dtype=torch.bool, device=device)
    if causal:
        visible &= keys <= queries
    if left >= 0:
        visible &= keys >= queries - left
    if right >= 0:
        visible &= keys <= queries + right
    return visible


def _attend_one(call: AttentionCall, seq_idx: int, first: int, end: int, length: int) -> None:
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query = call.query[first:end].to(dtype)
    num_queries, num_q_heads, _ = query.shape
    visible = visible_keys(
        num_queries, length, causal=call.causal, window=(call.window_left, call.window_right), device=query.device
    )
    if call.tree_mask is not None:
        visible &= _tree_visible(call.tree_mask[first:end], num_queries, length)
    # Keys that nobody sees may lie in blocks that are gone: they are not read at all.
    used = visible.any(0)
    positions = torch.arange(length, device=query.device)[used]
    visible = visible[:, used]
    keys = _gather(call.key_cache, call.k_scale, call.block_tables[seq_idx], positions, dtype)
    values = _gather(call.value_cache, call.v_scale, call.block_tables[seq_idx], positions, dtype)
    group = num_q_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)

    scores = torch.einsum("qhd,khd->hqk", query, keys) * call.scale
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        query_positions = torch.arange(length - num_queries, length, device=query.device)
        distance = (positions[None, :] - query_positions[:, None]).abs().to(dtype)
        scores = scores - call.alibi_slopes.to(dtype)[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    lse = torch.logsumexp(scores, -1)
    # A query that sees nothing has lse = -inf and gets zeros.
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., : len(positions)]
    call.out[first:end] = torch.einsum("hqk,khd->qhd", weights, values).to(call.out.dtype)
    if call.lse is not None:
        call.lse[first:end] = lse.transpose(0, 1).to(call.lse.dtype)


def _tree_visible(tree_mask: Tensor, num_queries: int, length: int) -> Tensor:
    """(num_queries, length) bool: everything before the query tokens, and of these what the bits say."""
    bits = (tree_mask[:, :, None] >> torch.arange(32, device=tree_mask.device)) & 1
    among_queries = bits.flatten(1)[:, :num_queries].bool()
    before = torch.ones(num_queries, max(length - num_queries, 0), dtype=torch.bool, device=tree_mask.device)
    return torch.cat((before, among_queries), 1)[:, -length:] if length else before[:, :0]


def _gather(cache: Tensor, scale: Tensor | None, block_table: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values at `positions` of one sequence, as numbers: (n, kv_heads, head_dim)."""
    block_size = cache.shape[1]
    block_ids = block_table.long()[positions // block_size]
    offsets = positions % block_size
    if scale is not None and scale.ndim >= 3:
        scale = scale[block_ids, offsets]
    return dequantize(cache[block_ids, offsets], scale, dtype)


def _write_one(new: Tensor, cache: Tensor, slot_mapping: Tensor, scale: Tensor | None) -> None:
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted]
    block_ids, offsets = slots // cache.shape[1], slots % cache.shape[1]
    codes, scales = quantize(new[wanted], cache.dtype, scale)
    # Raw bytes: fp8 has no indexed assignment on every device.
    cache.view(torch.uint8)[block_ids, offsets] = codes.contiguous().view(torch.uint8)
    if scales is not None and scale is not None:
        scale[block_ids, offsets] = scales
