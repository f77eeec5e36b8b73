"""Overlapping heads: each head's q, k and v reach some channels into its neighbours'.

Source: T. Zhang, B. Luo, G. Wang, "Improving Vision Transformers by Overlapping Heads in Multi-Head Self-Attention", 2024,
arXiv:2410.14874 (MOHSA). The first and the last head have one neighbour, zeros stand for the other; the output projection
takes heads of head_dim + 2 * overlap. The paper's transformers see images (`causal=False`); the idea does not depend on it.

In the cache: plain heads, once. A token's row is [overlap zeros, heads one after the other, overlap zeros]; overlapping
heads are a view of it with a head stride of head_dim and head_dim + 2 * overlap channels. The op reads any strides.
"""

import torch
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv


def overlap_heads(x: Tensor, overlap: int) -> Tensor:
    """(tokens, heads, head_dim + 2 * overlap) of (tokens, heads, head_dim), a view of one padded copy."""
    row = torch.nn.functional.pad(x.flatten(1), (overlap, overlap))
    return row.unfold(1, x.shape[2] + 2 * overlap, x.shape[2])


class OverlappingCache:
    """Keys, or values, of one layer: `plain` heads to write, `overlapping` heads to read, in the same memory.

    plain: (num_blocks, block_size, num_heads, head_dim); overlapping: the same with head_dim + 2 * overlap
    """

    def __init__(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int, *, overlap: int) -> None:
        if overlap > head_dim:
            raise ValueError(f"overlap must be at most head_dim ({head_dim}), found {overlap}")
        width = num_heads * head_dim
        self.rows = torch.zeros(num_blocks, block_size, width + 2 * overlap)
        self.plain = self.rows[..., overlap : overlap + width].unflatten(-1, (num_heads, head_dim))
        self.overlapping = self.rows.unfold(-1, head_dim + 2 * overlap, head_dim)
        self.overlap = overlap


def write(key: Tensor, value: Tensor, caches: tuple[OverlappingCache, OverlappingCache], slots: Tensor) -> None:
    """Write plain heads (tokens, heads, head_dim); the zeros at a row's ends stay."""
    write_kv(key, value, caches[0].plain, caches[1].plain, slots)


def attend(
    query: Tensor,
    caches: tuple[OverlappingCache, OverlappingCache],
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    causal: bool = True,
) -> Tensor:
    """Attention of a ragged batch, (tokens, heads, head_dim + 2 * overlap); query: plain heads (tokens, heads, head_dim)."""
    keys, values = caches
    wide = overlap_heads(query, keys.overlap)
    return paged_attention(
        wide, keys.overlapping, values.overlapping, block_tables, seq_lens, query_start_loc, causal=causal
    )


def main() -> None:
    """Attend with heads of 16 channels that reach 4 into each neighbour, and say what that costs in memory."""
    generator = torch.Generator().manual_seed(0)
    caches = tuple(OverlappingCache(3, 4, 8, 16, overlap=4) for _ in range(2))
    key, value = torch.randn(2, 6, 8, 16, generator=generator)
    write(key, value, (caches[0], caches[1]), torch.tensor([8, 9, 10, 11, 0, 1]))
    table, length = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    out = attend(torch.randn(1, 8, 16, generator=generator), (caches[0], caches[1]), table, length, starts)
    row, copied = caches[0].rows.shape[-1], 8 * (16 + 8)
    print(f"out {tuple(out.shape)}; {row} numbers a token and cache, copied overlaps would take {copied}")


if __name__ == "__main__":
    main()
