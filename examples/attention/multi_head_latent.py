"""Multi-head latent attention: all heads read one small latent vector per token, as keys and as values.

Source: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024,
arXiv:2405.04434, section 2.1. A token's latent c (512 numbers there) holds keys and values of all heads,
k_i = W_UK_i c and v_i = W_UV_i c; a key part of 64 numbers that all heads share carries RoPE. W_UK moves into the query,
q_i . (W_UK_i c) = (W_UK_i^T q_i) . c, and W_UV behind the softmax, so keys and values are never made.

In the cache: (c, k_rope) as one KV head, 576 numbers a token. The values are a view of the keys' first 512.
"""

import math

import torch
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv


def absorb_query(query_nope: Tensor, query_rope: Tensor, w_uk: Tensor) -> Tensor:
    """Queries that read latents: (tokens, heads, latent + rope) from (tokens, heads, nope) and (tokens, heads, rope).

    w_uk: (heads, nope, latent). A model would fold it into its query projection once.
    """
    return torch.cat((torch.einsum("thn,hnl->thl", query_nope, w_uk), query_rope), dim=-1)


def expand_output(out: Tensor, w_uv: Tensor) -> Tensor:
    """The heads' outputs (tokens, heads, value_dim) from mixed latents (tokens, heads, latent).

    w_uv: (heads, value_dim, latent). A model would fold it into its output projection once.
    """
    return torch.einsum("thl,hvl->thv", out, w_uv)


def write_latents(latent: Tensor, key_rope: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store (tokens, latent) and (tokens, rope), already rotated, in a cache (blocks, block_size, 1, latent + rope)."""
    write_kv(torch.cat((latent, key_rope), dim=-1)[:, None], None, cache, None, slots)


def attend(
    query: tuple[Tensor, Tensor],
    up_projections: tuple[Tensor, Tensor],
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
) -> Tensor:
    """Attention of a ragged batch, (tokens, heads, value_dim); query: nope and rope parts; up_projections: w_uk, w_uv."""
    (query_nope, query_rope), (w_uk, w_uv) = query, up_projections
    # The scores are those of the heads' own keys, so the scale is theirs. The op's default would take latent + rope.
    scale = 1 / math.sqrt(query_nope.shape[-1] + query_rope.shape[-1])
    absorbed = absorb_query(query_nope, query_rope, w_uk)
    values = cache[..., : w_uk.shape[-1]]
    return expand_output(
        paged_attention(absorbed, cache, values, block_tables, seq_lens, query_start_loc, scale=scale), w_uv
    )


def main() -> None:
    """Serve two sequences in one call, and say what a token costs beside explicit heads."""
    heads, nope, rope, latent, value = 16, 16, 8, 64, 16
    generator = torch.Generator().manual_seed(0)
    w_uk, w_uv = (torch.randn(heads, dim, latent, generator=generator) / 8 for dim in (nope, value))
    cache = torch.full((6, 4, 1, latent + rope), torch.nan)
    tables = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)
    lengths = torch.tensor([9, 6], dtype=torch.int32)
    slots = (tables.long()[:, :, None] * 4 + torch.arange(4)).flatten(1)  # of every position, a row per sequence
    written = torch.cat((slots[0, :9], slots[1, :6]))
    latents, key_ropes = torch.randn(15, latent + rope, generator=generator).split((latent, rope), dim=1)
    write_latents(latents, key_ropes, cache, written)
    query = tuple(torch.randn(4, heads, dim, generator=generator) for dim in (nope, rope))
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)  # a chunk of three tokens, and a decode
    out = attend((query[0], query[1]), (w_uk, w_uv), cache, tables, lengths, starts)
    explicit = heads * (nope + rope + value)
    print(f"out {tuple(out.shape)}; {latent + rope} numbers a token, explicit heads would take {explicit}")


if __name__ == "__main__":
    main()
