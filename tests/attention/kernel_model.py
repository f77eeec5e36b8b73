"""A kernel as it might be written, in torch: it follows the plan task by task and reads block by block.

Slow, and simple enough to be read at once. It checks that a plan's tasks and merges say all that a kernel needs, and it is
where the tests of the tests plant their faults: each line is one that a real kernel has too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.partition import Partition

__all__ = ["KernelModel"]


class KernelModel:
    """Attention by tiles of one block with a running maximum; splits of four keys and more."""

    name = "model"

    def unavailable(self) -> str | None:
        return None

    def runs_on(self, device_type: str) -> bool:
        return device_type == "cpu"

    def refuses(self, features: Features) -> str | None:
        return None

    def refuses_write(self, features: Features) -> str | None:
        return "it only reads"

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        return Partition(num_workers=4, max_decode_rows=8, query_tile=4, min_split=4, tasks_per_worker=2)

    def know_attention(self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]) -> None:
        """Nothing: each call is checked."""

    def know_write(self, call: WriteCall, asked: str | None) -> None:
        """Nothing: each write is checked."""

    def describe(self) -> str:
        return "a model of a kernel"

    def write(self, call: WriteCall) -> None:
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> None:
        num_q_heads, value_dim = call.out.shape[1:]
        partial_out = torch.full((call.counts.num_partial_tokens, num_q_heads, value_dim), torch.nan)
        partial_lse = torch.full(partial_out.shape[:2], torch.nan)
        for seq_idx, first, end, first_key, end_key, partial_idx in call.tasks.T.tolist():
            out, lse = attend_task(call, seq_idx, first, end, first_key, end_key)
            if partial_idx < 0:
                finish(call, first, end, out, lse)
            else:
                partial_out[partial_idx : partial_idx + end - first] = out
                partial_lse[partial_idx : partial_idx + end - first] = lse
        for first, end, partial_idx, num_splits in call.merges.T.tolist():
            parts = slice(partial_idx, partial_idx + num_splits * (end - first))
            outs = partial_out[parts].view(num_splits, end - first, num_q_heads, value_dim)
            lses = partial_lse[parts].view(num_splits, end - first, num_q_heads)
            lse = torch.logsumexp(lses, 0)
            weights = torch.exp(lses - torch.where(lse == -torch.inf, 0, lse))
            finish(call, first, end, (outs * weights[..., None]).sum(0), lse)


def finish(call: AttentionCall, first: int, end: int, out: Tensor, lse: Tensor) -> None:
    """Let the sink take its share, and store."""
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks[None])
        out = out * torch.exp(lse - torch.where(total == -torch.inf, 0, total))[..., None]
        lse = total
    call.out[first:end] = out.to(call.out.dtype)
    if call.lse is not None:
        call.lse[first:end] = lse


def attend_task(
    call: AttentionCall, seq_idx: int, first: int, end: int, first_key: int, end_key: int
) -> tuple[Tensor, Tensor]:
    """(n, q_heads, value_dim) and (n, q_heads) of some query tokens over a range of keys, without the sink."""
    block_size, num_kv_heads = call.key_cache.shape[1:3]
    num_q_heads, value_dim = call.out.shape[1:]
    length, seq_end = int(call.seq_lens[seq_idx]), int(call.query_start_loc[seq_idx + 1])
    seq_start = int(call.query_start_loc[seq_idx])
    query = call.query[first:end].float() * call.scale
    query = query.view(end - first, num_kv_heads, num_q_heads // num_kv_heads, -1)
    query_positions = torch.arange(length - (seq_end - first), length - (seq_end - end))
    highest = torch.full((*query.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(highest)
    weighted = torch.zeros(*query.shape[:3], value_dim)
    for column in range(first_key // block_size, -(-end_key // block_size)):
        positions = column * block_size + torch.arange(block_size)
        is_inside = (positions >= first_key) & (positions < end_key)
        block_id = int(call.block_tables[seq_idx, column])
        keys = numbers(call.key_cache, call.k_scale, block_id)
        values = numbers(call.value_cache, call.v_scale, block_id)
        scores = torch.einsum("qhgd,khd->qhgk", query, keys)
        if call.softcap > 0:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        distance = positions[None] - query_positions[:, None]
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes.view(1, num_kv_heads, -1, 1)
            scores = scores - slopes * distance.abs()[:, None, None]
        visible = is_inside[None] & torch.ones_like(distance, dtype=torch.bool)
        if call.causal:
            visible &= distance <= 0
        if call.window_left >= 0:
            visible &= distance >= -call.window_left
        if call.window_right >= 0:
            visible &= distance <= call.window_right
        if call.tree_mask is not None:
            among = positions - (length - (seq_end - seq_start))
            word_idx = torch.clamp(among // 32, 0, call.tree_mask.shape[1] - 1)
            bits = call.tree_mask[first:end][:, word_idx] >> (among % 32)
            visible &= (among < 0) | ((bits & 1) == 1)
        scores = torch.where(visible[:, None, None], scores, -torch.inf)
        values = torch.where(visible.any(0)[:, None, None], values, 0)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        base = torch.where(new_highest == -torch.inf, 0, new_highest)
        weights, decay = torch.exp(scores - base), torch.exp(highest - base)
        total = total * decay + weights.sum(-1, keepdim=True)
        weighted = weighted * decay + torch.einsum("qhgk,khd->qhgd", weights, values)
        highest = new_highest
    out = weighted / torch.where(total > 0, total, 1)
    lse = torch.where(total > 0, highest + torch.log(total), -torch.inf)
    return out.flatten(1, 2), lse.flatten(1)


def numbers(cache: Tensor, scale: Tensor | None, block_id: int) -> Tensor:
    """The keys or values of one block in float32, unused slots included: (block_size, kv_heads, dim)."""
    codes = cache[block_id]
    if cache.dtype == torch.uint8 and scale is not None:
        low, high = codes & 15, codes >> 4
        nibbles = torch.stack((low, high), -1).flatten(-2).float()
        step, minimum = scale[block_id].float().repeat_interleave(nibbles.shape[-1] // scale.shape[3], 2).unbind(-1)
        return nibbles * step + minimum
    if scale is None:
        return codes.float()
    if scale.ndim == 3:
        scale = scale[block_id]
    elif scale.ndim == 1:
        scale = scale[None]
    return codes.float() * scale[..., None]
