"""Multi-head latent attention with absorbed projections against the same with explicit heads."""

import math

import pytest
import torch
from attention_examples import assert_near, causal, dense, int32, load, slots_of
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv

example = load("multi_head_latent")

# nope, rope, latent, value_dim, block_size: small ones, and the shape of DeepSeek-V2's heads.
DIMS = pytest.mark.parametrize("dims", [(6, 4, 12, 5, 4), (128, 64, 512, 128, 16)], ids=["small", "deepseek"])
HEADS = 4
TABLE = int32(3, 0, 2)


def inputs(dims: tuple[int, ...], num_tokens: int = 9) -> tuple[Tensor, ...]:
    """query_nope, query_rope, w_uk, w_uv, latent, key_rope."""
    nope, rope, latent, value_dim, _ = dims
    generator = torch.Generator().manual_seed(2)
    shapes = [(num_tokens, HEADS, nope), (num_tokens, HEADS, rope), (HEADS, nope, latent), (HEADS, value_dim, latent)]
    shapes += [(num_tokens, latent), (num_tokens, rope)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[2], made[3] = made[2] / math.sqrt(latent), made[3] / math.sqrt(latent)
    return tuple(made)


def explicit_heads(w_uk: Tensor, w_uv: Tensor, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (tokens, heads, nope + rope) and values (tokens, heads, value_dim) of each head."""
    key_nope = torch.einsum("hnl,tl->thn", w_uk, latent)
    key = torch.cat((key_nope, key_rope[:, None].expand(-1, HEADS, -1)), dim=-1)
    return key, torch.einsum("hvl,tl->thv", w_uv, latent)


def prefill_and_decode(dims: tuple[int, ...], made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Six tokens at once, then three one by one; and the cache."""
    query_nope, query_rope, w_uk, w_uv, latent, key_rope = made
    block_size = dims[4]
    cache = torch.full((4, block_size, 1, dims[2] + dims[1]), torch.nan)
    slots, outs = slots_of(TABLE, block_size), []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        example.write_latents(latent[start:end], key_rope[start:end], cache, slots[start:end])
        query, starts = (query_nope[start:end], query_rope[start:end]), int32(0, end - start)
        outs.append(example.attend(query, (w_uk, w_uv), cache, TABLE[None], int32(end), starts))
    return torch.cat(outs), cache


@DIMS
def test_absorbed_attention_equals_attention_with_explicit_heads(dims: tuple[int, ...]) -> None:
    made = inputs(dims)
    query_nope, query_rope, *rest = (x.double() for x in made)
    key, value = explicit_heads(*rest)

    out, _ = prefill_and_decode(dims, made)

    assert_near(out, dense(torch.cat((query_nope, query_rope), -1), key, value, causal(9, 9)))


@DIMS
def test_absorbed_attention_equals_the_op_on_explicit_heads(dims: tuple[int, ...]) -> None:
    made = inputs(dims)
    query_nope, query_rope, *rest = made
    key, value = explicit_heads(*rest)
    key_cache = torch.full((4, dims[4], HEADS, dims[0] + dims[1]), torch.nan)
    value_cache = torch.full((4, dims[4], HEADS, dims[3]), torch.nan)
    write_kv(key, value, key_cache, value_cache, slots_of(TABLE, dims[4])[:9])

    query = torch.cat((query_nope, query_rope), -1)
    explicit = paged_attention(query, key_cache, value_cache, TABLE[None], int32(9), int32(0, 9))

    assert_near(prefill_and_decode(dims, made)[0], explicit)


def test_a_token_takes_its_latent_and_one_rope_part_and_nothing_else() -> None:
    dims = (6, 4, 12, 5, 4)
    made = inputs(dims)

    _, cache = prefill_and_decode(dims, made)

    assert cache.shape == (4, 4, 1, 16)
    assert cache[3, 1, 0].tolist() == [*made[4][1].tolist(), *made[5][1].tolist()]
    assert int(cache.isnan().any(-1).sum()) == 7


def test_two_sequences_are_served_in_one_call() -> None:
    dims = (6, 4, 12, 5, 4)
    query_nope, query_rope, w_uk, w_uv, latent, key_rope = inputs(dims, num_tokens=14)
    cache = torch.full((6, 4, 1, 16), torch.nan)
    tables = torch.stack((int32(4, 0, 2), int32(1, 5, -1)))
    first, second = slice(0, 9), slice(9, 14)
    for table, tokens in zip(tables, (first, second), strict=True):
        new = latent[tokens]
        example.write_latents(new, key_rope[tokens], cache, slots_of(table, 4)[: len(new)])

    rows = [7, 8, 13]  # the last two of the first, the last of the second
    query = (query_nope[rows], query_rope[rows])
    out = example.attend(query, (w_uk, w_uv), cache, tables, int32(9, 5), int32(0, 2, 3))

    whole = torch.cat((query_nope, query_rope), -1)
    expected = [
        dense(whole[tokens], *explicit_heads(w_uk, w_uv, latent[tokens], key_rope[tokens]), causal(n, n))
        for tokens, n in ((first, 9), (second, 5))
    ]
    assert_near(out, torch.cat(expected)[rows])
