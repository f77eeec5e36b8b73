"""Heads chosen per token and weighted."""

import pytest
import torch
from attention_examples import SIZES, assert_near, causal, dense, empty, int32, load, slots_of
from torch import Tensor

from pagedkv.attention import paged_attention

example = load("mixture_of_heads")

TABLE = int32(2, 0, 3)


def written(block_size: int, head_dim: int, num_kv_heads: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """query, key, value of ten tokens and eight query heads, and the pages, (blocks, kv_heads, block_size, head_dim)."""
    generator = torch.Generator().manual_seed(8)
    made = [torch.randn(10, heads, head_dim, generator=generator) for heads in (8, num_kv_heads, num_kv_heads)]
    pages = empty(4, num_kv_heads, block_size, head_dim)
    example.write(made[1], made[2], *pages, slots_of(TABLE, block_size)[:10])
    return made, pages


def router(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (10, 32), and routers for 2 shared and 6 routed heads."""
    generator = torch.Generator().manual_seed(9)
    return (
        *(
            torch.randn(n, 32, generator=generator) * factor
            for n, factor in ((10, 1.0), *((n, scale) for n in (2, 6, 2)))
        ),
    )


@SIZES
@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_the_output_is_the_weighted_sum_of_the_chosen_heads(block_size: int, head_dim: int, num_kv_heads: int) -> None:
    (query, key, value), pages = written(block_size, head_dim, num_kv_heads)
    weights = example.gates(*router(), top_k=3)
    w_out = torch.randn(8, head_dim, 32, generator=torch.Generator().manual_seed(10)).double() / 8
    heads = dense(query, key, value, causal(10, 10))

    prefill = example.attend(query[:7], weights[:7], *pages, TABLE.expand(7, -1), torch.arange(7))
    decodes = [
        example.attend(query[i : i + 1], weights[i : i + 1], *pages, TABLE[None], torch.tensor([i])) for i in (7, 8, 9)
    ]

    out = torch.cat((prefill, *decodes))
    expected = sum(weights[:, i, None] * (heads[:, i] @ w_out[i]) for i in range(8))
    assert_near(torch.einsum("thd,hdm->tm", out.double(), w_out), expected)


@SIZES
def test_without_a_preference_all_heads_on_is_plain_multi_head_attention(block_size: int, head_dim: int) -> None:
    (query, _, _), pages = written(block_size, head_dim, 8)
    weights = example.gates(*router(0.0), top_k=6)

    out = example.attend(query, weights, *pages, TABLE.expand(10, -1), torch.arange(10))

    keys, values = (x.transpose(1, 2) for x in pages)
    assert_near(weights, torch.ones(10, 8))
    assert_near(out, paged_attention(query, keys, values, TABLE[None], int32(10), int32(0, 10)))


def test_shared_heads_are_always_on_and_each_token_chooses_its_best_routed_ones() -> None:
    hidden, w_shared, w_routed, w_kind = router()

    weights = example.gates(hidden, w_shared, w_routed, w_kind, top_k=2)

    best = (hidden @ w_routed.T).topk(2, dim=-1).indices.sort(-1).values
    assert (weights[:, :2] > 0).all()
    assert [row.nonzero().flatten().tolist() for row in weights[:, 2:]] == best.tolist()
    assert len({tuple(row) for row in best.tolist()}) > 1


def test_weights_follow_the_two_stage_formula() -> None:
    hidden = torch.eye(2)[:1]
    w_shared = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).log()
    w_routed = torch.tensor([[1.0, 0.0], [6.0, 0.0], [2.0, 0.0]]).log()
    w_kind = torch.tensor([[1.0, 0.0], [4.0, 0.0]]).log()
    w_shared[:, 1] = w_routed[:, 1] = w_kind[:, 1] = 0

    weights = example.gates(hidden, w_shared, w_routed, w_kind, top_k=2)

    # Shared: 2 * (1/5) * 2 * (1/4, 3/4); routed: 2 * (4/5) * 2 * (0, 6/8, 2/8).
    assert_near(weights, torch.tensor([[0.2, 0.6, 0.0, 2.4, 0.8]]))


def test_a_head_that_no_token_chose_is_not_read() -> None:
    (query, _, _), pages = written(4, 8, 8)
    weights = example.gates(*router(), top_k=3)
    weights[:, 5] = 0
    expected = example.attend(query, weights, *pages, TABLE.expand(10, -1), torch.arange(10))
    for page in pages:
        page[:, 5] = torch.nan

    out = example.attend(query, weights, *pages, TABLE.expand(10, -1), torch.arange(10))

    assert out.tolist() == expected.tolist()
    assert (out[:, 5] == 0).all()
