"""Grouped-query attention from a multi-head checkpoint: the K and V heads of a group become their mean.

Source: J. Ainslie, J. Lee-Thorp, M. de Jong, Y. Zemlyanskiy, F. Lebron, S. Sanghai, "GQA: Training Generalized Multi-Query
Transformer Models from Multi-Head Checkpoints", 2023, arXiv:2305.13245, section 2.1. One group is multi-query attention
(N. Shazeer, "Fast Transformer Decoding", 2019, arXiv:1911.02150). The paper trains on for a few per cent of the original
steps afterwards: pooling alone is the start of that, not the end.

In the cache: `num_kv_heads` pooled heads in place of `num_heads`, so the bytes of a token shrink by the group's size.
"""

import torch
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv


def pool_heads(weight: Tensor, num_kv_heads: int) -> Tensor:
    """The mean of each group of consecutive heads: (num_heads, head_dim, model_dim) to (num_kv_heads, ...).

    Consecutive, because the op lets query head h read KV head h // (q_heads // kv_heads). The mean of the heads' keys is
    the key of the mean head, for a projection is linear; and so is RoPE, which turns all heads alike. A norm on keys is
    not: a model with one must train on.
    """
    return weight.unflatten(0, (num_kv_heads, -1)).mean(1)


def empty_cache(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """Keys and values of one layer, (2, num_blocks, block_size, num_kv_heads, head_dim); NaN, since nothing is written."""
    return torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan)


def attend(
    hidden: Tensor, projections: tuple[Tensor, Tensor, Tensor], cache: Tensor, block_table: Tensor, *, start: int
) -> Tensor:
    """Write the K/V of tokens start, start + 1, ... of one sequence, and attend: (tokens, q_heads, head_dim).

    hidden: (tokens, model_dim); projections: of q, k, v, each (heads, head_dim, model_dim); block_table: (blocks,) int32
    """
    query, key, value = (torch.einsum("tm,hdm->thd", hidden, weight) for weight in projections)
    key_cache, value_cache = cache.unbind(0)
    positions, block_size = torch.arange(start, start + len(hidden)), cache.shape[2]
    slots = block_table.long()[positions // block_size] * block_size + positions % block_size
    write_kv(key, value, key_cache, value_cache, slots)
    seq_lens = torch.tensor([start + len(hidden)], dtype=torch.int32)
    query_start_loc = torch.tensor([0, len(hidden)], dtype=torch.int32)
    return paged_attention(query, key_cache, value_cache, block_table[None], seq_lens, query_start_loc)


def main() -> None:
    """Pool eight heads into four, two and one, and say what a token costs and how far the output moves."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, 16, 64, generator=generator) / 8 for _ in range(3))
    hidden, block_table = torch.randn(10, 64, generator=generator), torch.tensor([2, 0, 1], dtype=torch.int32)
    full = attend(hidden, (q, k, v), empty_cache(3, 4, 8, 16), block_table, start=0)
    for num_kv_heads in (8, 4, 2, 1):
        cache = empty_cache(3, 4, num_kv_heads, 16)
        weights = (q, pool_heads(k, num_kv_heads), pool_heads(v, num_kv_heads))
        error = (attend(hidden, weights, cache, block_table, start=0) - full).norm() / full.norm()
        print(
            f"{num_kv_heads} KV heads: {cache.nbytes // 12:4} bytes a token; untrained, the output moves by {error:.0%}"
        )


if __name__ == "__main__":
    main()
