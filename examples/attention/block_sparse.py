"""Block-sparse attention, window + global + random blocks: a row's block table lists only the blocks it may see.

Source: M. Zaheer, G. Guruganesh, A. Dubey, J. Ainslie, C. Alberti, S. Ontanon, P. Pham, A. Ravula, Q. Wang, L. Yang,
A. Ahmed, "Big Bird: Transformers for Longer Sequences", 2020, arXiv:2007.14062, section 2; global blocks are the
sequence's first ones (its ITC form). The paper is about encoders; `causal` gives the half of the pattern that decodes.

In the cache: everything, as usual; what is saved is reading. Without a bias on positions attention is a sum over a set of
keys, so a table may leave blocks out (RoPE is in the keys already). All queries in a block see the same blocks, so a row of
the batch is one block of queries, and a whole prefill is one ragged call.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import paged_attention


@dataclass(frozen=True, slots=True)
class Pattern:
    """Blocks that a block of queries sees: `window`, the first `num_global`, and `num_random` others.

    The window ends with the own block if `causal`; otherwise it is odd and has the own block in the middle, and the
    global blocks' queries see everything.
    """

    window: int
    num_global: int
    num_random: int
    causal: bool = True
    seed: int = 0

    def blocks(self, query_block: int, num_blocks: int) -> list[int]:
        """What the queries of block `query_block` see, ascending, in a sequence of `num_blocks` blocks."""
        visible = range(query_block + 1) if self.causal else range(num_blocks)
        if query_block < self.num_global:
            return list(visible)
        first = query_block - (self.window - 1 if self.causal else self.window // 2)
        last = query_block if self.causal else query_block + self.window // 2
        seen = {i for i in visible if i < self.num_global or first <= i <= last}
        others = [i for i in visible if i not in seen]
        # Seeded by the block: every decode step within it draws the same.
        rng = np.random.default_rng((self.seed, query_block))
        seen.update(rng.choice(others, min(self.num_random, len(others)), replace=False).tolist())
        return sorted(seen)


def sparse_rows(
    block_table: Tensor, block_size: int, queries: range, num_tokens: int, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """(block_tables, seq_lens, query_start_loc) of the query positions `queries`, a row for each block of them.

    Only a sequence's last block can be partly filled. Blocks are listed in ascending order, so it stands last in every
    table that lists it, and the shortened seq_len ends in the right place; so does causal masking within the own block.
    """
    tables, lengths, starts = [], [], [0]
    for query_block in range(queries.start // block_size, -(-queries.stop // block_size)):
        end = min(queries.stop, (query_block + 1) * block_size)
        written = end if pattern.causal else num_tokens
        seen = pattern.blocks(query_block, -(-num_tokens // block_size))
        tables.append(block_table[seen])
        lengths.append(sum(min(block_size, written - i * block_size) for i in seen))
        starts.append(end - queries.start)
    padded = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)
    return padded, torch.tensor(lengths, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def attend(
    query: Tensor, caches: tuple[Tensor, Tensor], block_table: Tensor, *, num_tokens: int, pattern: Pattern
) -> Tensor:
    """Attention of the last len(query) of a sequence's `num_tokens` tokens, their K/V written; block_table: (blocks,) int32."""
    queries = range(num_tokens - len(query), num_tokens)
    rows = sparse_rows(block_table, caches[0].shape[1], queries, num_tokens, pattern)
    return paged_attention(query, *caches, *rows, causal=pattern.causal)


def main() -> None:
    """Show what each block of queries sees, and how many keys a decode step reads."""
    pattern, block_size = Pattern(window=2, num_global=1, num_random=1), 4
    for query_block in range(8):
        seen = pattern.blocks(query_block, 8)
        print("".join("#" if i in seen else "." for i in range(8)))
    generator = torch.Generator().manual_seed(0)
    key_cache, value_cache = torch.randn(2, 8, block_size, 2, 16, generator=generator)
    table = torch.randperm(8, generator=generator).int()
    _, lengths, _ = sparse_rows(table, block_size, range(30, 31), 31, pattern)
    out = attend(
        torch.randn(1, 4, 16, generator=generator), (key_cache, value_cache), table, num_tokens=31, pattern=pattern
    )
    print(f"token 30 reads {int(lengths[0])} keys of 31; out {tuple(out.shape)}")


if __name__ == "__main__":
    main()
