"""Grouped-query attention by mean-pooling the heads of a multi-head checkpoint."""

import pytest
import torch
from attention_examples import SIZES, assert_near, causal, dense, int32, load
from torch import Tensor

example = load("gqa_from_mha")


def projections(head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of q, k, v, for 8 heads over 32 channels, and 10 tokens."""
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(8, head_dim, 32, generator=generator) / 6 for _ in range(3))
    return *weights, torch.randn(10, 32, generator=generator)


def prefill_and_decode(hidden: Tensor, weights: tuple[Tensor, ...], block_size: int) -> Tensor:
    """Seven tokens at once, then one by one."""
    cache = example.empty_cache(4, block_size, weights[1].shape[0], weights[1].shape[1])
    table = int32(3, 0, 2)
    outs = [example.attend(hidden[:7], weights, cache, table, start=0)]
    outs += [example.attend(hidden[i : i + 1], weights, cache, table, start=i) for i in range(7, 10)]
    return torch.cat(outs)


@SIZES
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_pooling_heads_that_are_alike_within_a_group_changes_nothing(
    block_size: int, head_dim: int, num_kv_heads: int
) -> None:
    q, k, v, hidden = projections(head_dim)
    k, v = (weight[:num_kv_heads].repeat_interleave(8 // num_kv_heads, 0) for weight in (k, v))

    pooled = (q, example.pool_heads(k, num_kv_heads), example.pool_heads(v, num_kv_heads))

    assert_near(prefill_and_decode(hidden, pooled, block_size), prefill_and_decode(hidden, (q, k, v), block_size))


@SIZES
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_pooled_attention_is_attention_to_the_mean_keys_and_values_of_each_group(
    block_size: int, head_dim: int, num_kv_heads: int
) -> None:
    q, k, v, hidden = projections(head_dim)
    query, key, value = (torch.einsum("tm,hdm->thd", hidden.double(), w.double()) for w in (q, k, v))
    mean_key, mean_value = (x.unflatten(1, (num_kv_heads, -1)).mean(2) for x in (key, value))

    pooled = (q, example.pool_heads(k, num_kv_heads), example.pool_heads(v, num_kv_heads))

    assert_near(prefill_and_decode(hidden, pooled, block_size), dense(query, mean_key, mean_value, causal(10, 10)))


def test_a_group_is_of_consecutive_heads() -> None:
    weight = torch.tensor([0.0, 2.0, 10.0, 20.0])[:, None, None]

    assert example.pool_heads(weight, 2).flatten().tolist() == [1.0, 15.0]


def test_the_bytes_of_a_token_shrink_by_the_size_of_a_group() -> None:
    sizes = [example.empty_cache(1, 4, num_kv_heads, 16).nbytes // 4 for num_kv_heads in (8, 2, 1)]

    assert sizes == [1024, 256, 128]
