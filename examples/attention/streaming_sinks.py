"""Endless sequences in constant memory: keep the first blocks, the attention sinks, and a sliding window of recent ones.

Source: G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient Streaming Language Models with Attention Sinks", 2023,
arXiv:2309.17453, section 3.2. Positions are those within the cache, not those in the text: what was dropped leaves no gap.
The paper caches keys before RoPE and turns all of them in every step. Here keys are cached turned, once, at their place
in the text: only distances count, and among recent tokens these are right already. For the sinks, which moved nearer,
the *query* is turned back by what was dropped. Two rows of one call, put together by their LSE.

In the cache: sinks and window, `num_sinks + num_recent` blocks however long the text; the others go back to the pool.
"""

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import merge_states, paged_attention, write_kv
from pagedkv.block_pool import BlockPool


class SinkWindow:
    """The blocks that one sequence keeps, sinks first: `blocks`, the `num_kept` tokens in them, and `num_dropped` tokens."""

    def __init__(self, pool: BlockPool, block_size: int, *, num_sinks: int, num_recent: int) -> None:
        self.pool, self.block_size = pool, block_size
        self.num_sinks, self.num_recent = num_sinks, num_recent
        self.blocks: list[int] = []
        self.num_kept = self.num_dropped = 0

    def append(self) -> int:
        """The slot of the next token. Where that needs a block too many, the oldest recent block is given back first."""
        if self.num_kept % self.block_size == 0:
            if len(self.blocks) == self.num_sinks + self.num_recent:
                self.pool.release(np.array([self.blocks.pop(self.num_sinks)]))
                self.num_kept -= self.block_size
                self.num_dropped += self.block_size
            self.blocks += self.pool.allocate(1).tolist()
        self.num_kept += 1
        return self.blocks[-1] * self.block_size + (self.num_kept - 1) % self.block_size


def rotate(x: Tensor, position: int, base: float = 10000.0) -> Tensor:
    """RoPE of (tokens, heads, head_dim) at one position, halves paired. In float64: a stream's positions grow large."""
    half = x.shape[-1] // 2
    angles = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def step_rope(query: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], kept: SinkWindow) -> Tensor:
    """Write one token and attend to what is kept: (1, q_heads, value_dim); query and key: (1, heads, head_dim), not turned."""
    slot = kept.append()
    in_cache, in_text = kept.num_kept - 1, kept.num_kept - 1 + kept.num_dropped
    write_kv(rotate(key, in_text), value, *caches, torch.tensor([slot]))
    queries = torch.cat((rotate(query, in_cache), rotate(query, in_text)))
    num_sink_tokens = min(kept.num_kept, kept.num_sinks * kept.block_size)
    parts = [torch.tensor(part, dtype=torch.int32) for part in np.split(kept.blocks, [kept.num_sinks])]
    tables = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)
    lengths = torch.tensor([num_sink_tokens, kept.num_kept - num_sink_tokens], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    out, lse = paged_attention(queries, *caches, tables, lengths, starts, return_lse=True)
    return merge_states(out[:1], lse[:1], out[1:], lse[1:])[0]


def step_alibi(
    query: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], kept: SinkWindow, slopes: Tensor
) -> Tensor:
    """As `step_rope` for a model with ALiBi: one row over [sinks] + [recent], whose places are the places in the cache."""
    write_kv(key, value, *caches, torch.tensor([kept.append()]))
    table, lengths = torch.tensor([kept.blocks], dtype=torch.int32), torch.tensor([kept.num_kept], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    return paged_attention(query, *caches, table, lengths, starts, alibi_slopes=slopes)


def main() -> None:
    """Stream forty tokens through a pool of four blocks."""
    generator = torch.Generator().manual_seed(0)
    pool = BlockPool(4)
    kept = SinkWindow(pool, 4, num_sinks=1, num_recent=3)
    key_cache, value_cache = torch.full((2, 4, 4, 2, 16), torch.nan)
    for i in range(40):
        query, key, value = (torch.randn(1, heads, 16, generator=generator) for heads in (4, 2, 2))
        out = step_rope(query, key, value, (key_cache, value_cache), kept)
        if i % 13 == 0:
            print(
                f"token {i}: blocks {kept.blocks}, {kept.num_kept} kept, {kept.num_dropped} dropped, out {tuple(out.shape)}"
            )


if __name__ == "__main__":
    main()
