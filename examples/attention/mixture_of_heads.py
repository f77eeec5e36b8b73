"""Mixture-of-head attention: some heads work for every token, of the others each token chooses a few.

Source: P. Jin, B. Zhu, L. Yuan, S. Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, arXiv:2410.11842,
section 3. Multi-head attention is the sum of H_i W_O_i over heads; here it is weighted, sum g_i H_i W_O_i, with g_i = 0
for heads that a token did not choose. As in the paper's code, each softmax is multiplied by its number of entries, and the
weights of the chosen are normalised, so that a router without a preference gives plain multi-head attention.

In the cache: all heads of all tokens, since a later token may choose any. What is saved is reading: where heads lie apart
(HND), head h of block b is block b * kv_heads + h of a cache with one head, and a chosen head is a sequence of its own.
"""

import torch
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv


def gates(hidden: Tensor, w_shared: Tensor, w_routed: Tensor, w_kind: Tensor, *, top_k: int) -> Tensor:
    """Weights of the heads, (tokens, shared + routed), 0 where a head is not chosen.

    hidden: (tokens, model_dim); w_shared, w_routed: (heads of the kind, model_dim); w_kind: (2, model_dim), shared first
    """
    shared = torch.softmax(hidden @ w_shared.T, dim=-1) * len(w_shared)
    scores = torch.softmax(hidden @ w_routed.T, dim=-1)
    best, chosen = scores.topk(top_k, dim=-1)
    routed = torch.zeros_like(scores).scatter(1, chosen, best / best.sum(-1, keepdim=True) * top_k)
    kind = torch.softmax(hidden @ w_kind.T, dim=-1) * 2
    return torch.cat((kind[:, :1] * shared, kind[:, 1:] * routed), dim=-1)


def write(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Write all heads; pages: (blocks, kv_heads, block_size, head_dim), contiguous. The op sees them through strides."""
    write_kv(key, value, key_pages.transpose(1, 2), value_pages.transpose(1, 2), slots)


def attend(
    query: Tensor, weights: Tensor, key_pages: Tensor, value_pages: Tensor, block_tables: Tensor, positions: Tensor
) -> Tensor:
    """Weighted outputs (tokens, q_heads, value_dim), zeros where a head is not chosen, of which nothing is read.

    query: (tokens, q_heads, head_dim); weights: by `gates`; block_tables: (tokens, max_blocks) int32, for each token that
    of its sequence; positions: (tokens,) int64. Decodes and prefill alike: every (token, chosen head) is a row.
    """
    token, head = weights.nonzero(as_tuple=True)
    num_kv_heads = key_pages.shape[1]
    kv_head = (head // (query.shape[1] // num_kv_heads)).int()
    chosen = paged_attention(
        query[token, head][:, None],
        key_pages.flatten(0, 1).unsqueeze(2),
        value_pages.flatten(0, 1).unsqueeze(2),
        block_tables[token] * num_kv_heads + kv_head[:, None],
        (positions[token] + 1).int(),
        torch.arange(len(token) + 1, dtype=torch.int32),
    )
    out = chosen.new_zeros(*weights.shape, chosen.shape[-1])
    out[token, head] = chosen[:, 0] * weights[token, head][:, None]
    return out


def main() -> None:
    """Decode one token with two shared heads and two of six routed ones."""
    generator = torch.Generator().manual_seed(0)
    key_pages, value_pages = torch.full((2, 3, 8, 4, 16), torch.nan)
    slots = torch.tensor([8, 9, 10, 11, 0, 1])  # six tokens in blocks 2 and 0
    write(*torch.randn(2, 6, 8, 16, generator=generator), key_pages, value_pages, slots)
    hidden = torch.randn(1, 32, generator=generator)
    w_shared, w_routed, w_kind = (torch.randn(n, 32, generator=generator) / 6 for n in (2, 6, 2))
    weights = gates(hidden, w_shared, w_routed, w_kind, top_k=2)
    table, positions = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([5])
    out = attend(torch.randn(1, 8, 16, generator=generator), weights, key_pages, value_pages, table, positions)
    print("weights", " ".join(f"{w:.2f}" for w in weights[0].tolist()))
    print(f"{int((out.abs().sum(-1) > 0).sum())} heads of {out.shape[1]} read")


if __name__ == "__main__":
    main()
