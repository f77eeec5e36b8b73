"""Steps of a few tokens whose keys and values are also at hand in order, and attention over them in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SmallStep", "check_close", "naive_attention", "small_step"]

GARBAGE_ID = -7


@dataclass(frozen=True)
class SmallStep:
    """The tensors of a call; and of each sequence its keys and values, (length, kv_heads, dim)."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `paged_attention` takes, in order."""
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
        )


def small_step(
    *lens: tuple[int, int],
    block_size: int = 4,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    layout: str = "nhd",
) -> SmallStep:
    """Sequences of (query tokens, length) each, in scattered blocks. Unused slots are NaN, unused table entries garbage."""
    generator = torch.Generator().manual_seed(len(lens) + 1000 * block_size)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    num_used = [-(-length // block_size) for _, length in lens]
    num_blocks = sum(num_used) + 2
    block_ids = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.full((len(lens), max(num_used, default=0) + 1), GARBAGE_ID, dtype=torch.int32)
    if layout == "hnd":
        caches = [
            torch.full((num_blocks, num_kv_heads, block_size, dim), torch.nan, dtype=dtype).transpose(1, 2)
            for dim in (head_dim, value_dim)
        ]
    else:
        caches = [
            torch.full((num_blocks, block_size, num_kv_heads, dim), torch.nan, dtype=dtype)
            for dim in (head_dim, value_dim)
        ]
    if layout == "latent":
        caches[1] = caches[0][..., :value_dim]
    keys, values = [], []
    for seq_idx, (_, length) in enumerate(lens):
        new_keys, new_values = randn(length, num_kv_heads, head_dim), randn(length, num_kv_heads, value_dim)
        if layout == "latent":
            new_values = new_keys[..., :value_dim]
        keys.append(new_keys)
        values.append(new_values)
        for column in range(num_used[seq_idx]):
            block_id = block_ids.pop()
            tables[seq_idx, column] = block_id
            part = slice(column * block_size, min((column + 1) * block_size, length))
            caches[0][block_id, : part.stop - part.start] = new_keys[part]
            caches[1][block_id, : part.stop - part.start] = new_values[part]
    starts = [0]
    for num_queries, _ in lens:
        starts.append(starts[-1] + num_queries)
    return SmallStep(
        query=randn(starts[-1], num_kv_heads * group, head_dim),
        key_cache=caches[0],
        value_cache=caches[1],
        block_tables=tables,
        seq_lens=torch.tensor([length for _, length in lens], dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        keys=keys,
        values=values,
    )


def naive_attention(
    step: SmallStep,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sees: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, one query, head and key at a time. sees: [token, j], whether it sees its sequence's jth query token."""
    num_tokens, num_heads, head_dim = step.query.shape
    out = torch.zeros((num_tokens, num_heads, step.value_cache.shape[3]), dtype=torch.float64)
    lse = torch.zeros((num_tokens, num_heads), dtype=torch.float64)
    scale = head_dim**-0.5 if scale is None else scale
    left, right = window or (None, None)
    for seq_idx, length in enumerate(step.seq_lens.tolist()):
        first, end = step.query_start_loc[seq_idx : seq_idx + 2].tolist()
        for token in range(first, end):
            position = length - (end - token)
            for head in range(num_heads):
                kv_head = head * step.key_cache.shape[2] // num_heads
                scores: dict[int, float] = {}
                for key in range(length):
                    nth = key - (length - (end - first))
                    if (
                        (causal and key > position)
                        or (left is not None and key < position - left)
                        or (right is not None and key > position + right)
                        or (sees is not None and nth >= 0 and not sees[token, nth])
                    ):
                        continue
                    score = scale * float(step.query[token, head].double() @ step.keys[seq_idx][key, kv_head].double())
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if alibi_slopes is not None:
                        score -= float(alibi_slopes[head]) * abs(position - key)
                    scores[key] = score
                total = sum(math.exp(score) for score in scores.values())
                if sinks is not None:
                    total += math.exp(float(sinks[head]))
                lse[token, head] = math.log(total) if total else -math.inf
                for key, score in scores.items():
                    out[token, head] += math.exp(score) / total * step.values[seq_idx][key, kv_head].double()
    return out, lse


def check_close(found: Any, expected: tuple[Tensor, Tensor], atol: float = 1e-12) -> None:
    """Raise AssertionError unless output and LSE agree."""
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=atol)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=atol)
