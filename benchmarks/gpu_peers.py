"""What else computes the same on a GPU: torch's own attention, over keys that lie in one piece."""

from __future__ import annotations

from typing import Any

import torch
from gpu_cases import Call, Case, random_numbers, rotations
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["sdpa"]


def sdpa(case: Case) -> list[Call] | None:
    """Torch's attention over keys that lie in one piece; None where it has no counterpart: ragged, coded or latent."""
    if case.cache != "float" or case.is_latent or case.is_write or len(set(case.seqs)) > 1:
        return None
    num_queries, length = case.seqs[0]
    (num_q_heads, num_kv_heads), (key_dim, value_dim) = case.heads, case.dims
    calls: list[Call] = []
    for _ in range(rotations(case)):
        batch = len(case.seqs)
        keys, values = (
            random_numbers((batch, num_kv_heads, length, dim), torch.bfloat16) for dim in (key_dim, value_dim)
        )
        if num_queries == 1:
            # Heads of one KV head as rows: `enable_gqa` would read the keys once for each of them.
            query = torch.randn(batch, num_kv_heads, num_q_heads // num_kv_heads, key_dim, device="cuda").bfloat16()
            calls.append(lambda q=query, k=keys, v=values: scaled_dot_product_attention(q, k, v))
        else:
            # What a model does without `enable_gqa`, which not every kernel of torch's has.
            keys, values = (cache.repeat_interleave(num_q_heads // num_kv_heads, 1) for cache in (keys, values))
            query = torch.randn(batch, num_q_heads, num_queries, key_dim, device="cuda").bfloat16()
            mask: Any = None if num_queries == length else causal_lower_right(num_queries, length)
            calls.append(
                lambda q=query, k=keys, v=values, m=mask: scaled_dot_product_attention(
                    q, k, v, attn_mask=m, is_causal=m is None
                )
            )
    return calls
