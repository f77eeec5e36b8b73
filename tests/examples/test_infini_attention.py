"""A compressive memory of past segments, merged with paged attention within the segment."""

import math
from collections.abc import Callable

import pytest
import torch
from attention_examples import SIZES, assert_near, causal, dense, empty, int32, load
from torch import Tensor

from pagedkv.attention import merge_states, write_kv

example = load("infini_attention")


def text(head_dim: int, num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(num_tokens, heads, head_dim, generator=generator) for heads in (4, 2, 2)]


def f(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp()).double()


def joint(query: Tensor, key: Tensor, value: Tensor, segment: int) -> Tensor:
    """One normalisation over all tokens before: exp of the score within the segment, f(q) . f(k) before it."""
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1).double()
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) / math.sqrt(query.shape[2])
    linear = torch.einsum("qhd,khd->hqk", f(query), f(key))
    segments = torch.arange(len(query)) // segment
    same, before = segments[:, None] == segments, segments[:, None] > segments
    weights = scores.exp() * (same & causal(len(query), len(query))) + linear * before
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True), value)


@SIZES
def test_merging_by_lse_is_one_normalisation_over_segment_and_past(block_size: int, head_dim: int) -> None:
    query, key, value = text(head_dim, 7 * block_size + 1)

    out, _ = example.run(query, key, value, empty(3, block_size, 2, head_dim), int32(2, 0), example.by_lse)

    assert_near(out, joint(query, key, value, 2 * block_size))


@SIZES
def test_decoding_within_a_segment_equals_attending_to_it_at_once(block_size: int, head_dim: int) -> None:
    query, key, value = text(head_dim, 4 * block_size)
    caches, table, half = empty(3, block_size, 2, head_dim), int32(2, 0), 2 * block_size
    expected, _ = example.run(query, key, value, caches, table, example.by_lse)
    memory = example.Memory.empty(2, head_dim, head_dim).add(key[:half], value[:half])
    slots = (table.long()[:, None] * block_size + torch.arange(block_size)).flatten()

    for i in range(half, half + 3):
        write_kv(key[i : i + 1], value[i : i + 1], *caches, slots[i - half : i - half + 1])
        out = example.attend(
            query[i : i + 1], caches, table, length=i - half + 1, memory=memory, combine=example.by_lse
        )

        assert_near(out, expected[i : i + 1])


def test_reading_the_memory_is_linear_attention_to_every_token_in_it() -> None:
    query, key, value = text(8, 12)
    memory = example.Memory.empty(2, 8, 8).add(key[:5], value[:5]).add(key[5:], value[5:])

    out, lse = memory.read(query)

    weights = torch.einsum("qhd,khd->hqk", f(query), f(key).repeat_interleave(2, 1))
    total = weights.sum(-1)
    expected = torch.einsum("hqk,khd->qhd", weights / total[..., None], value.double().repeat_interleave(2, 1))
    assert_near(out, expected)
    assert_near(lse, total.log().T)


@pytest.mark.parametrize("combine", [example.by_lse, example.by_gate(torch.full((4,), -math.inf))])
def test_the_first_segment_sees_itself_alone(combine: Callable[..., Tensor]) -> None:
    query, key, value = text(8, 8)

    out, _ = example.run(query, key, value, empty(2, 4, 2, 8), int32(1, 0), combine)

    assert_near(out, dense(query, key, value, causal(8, 8)))


@pytest.mark.parametrize("combine", [example.by_lse, example.by_gate(torch.zeros(4))])
def test_no_token_sees_a_later_one_and_later_segments_see_an_earlier_one(combine: Callable[..., Tensor]) -> None:
    query, key, value = text(8, 24)
    before, _ = example.run(query, key, value, empty(2, 4, 2, 8), int32(1, 0), combine)
    key[5] += 1.0
    value[5] += 1.0

    after, _ = example.run(query, key, value, empty(2, 4, 2, 8), int32(1, 0), combine)

    assert (before != after).flatten(1).any(1).tolist() == [False] * 5 + [True] * 19


def test_the_gate_weighs_the_parts_by_a_sigmoid_per_head() -> None:
    memory, local = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(7))
    beta = torch.tensor([-2.0, 0.0, 1.0, 30.0])

    out = example.by_gate(beta)(memory, torch.zeros(3, 4), local, torch.zeros(3, 4))

    assert_near(out[:, 1], (memory[:, 1] + local[:, 1]) / 2)
    assert_near(out[:, 3], memory[:, 3])
    assert_near(out, merge_states(memory, beta.expand(3, 4), local, torch.zeros(3, 4))[0])


def test_the_delta_rule_adds_nothing_that_the_memory_returns_already() -> None:
    _, key, value = text(8, 1)
    memory = example.Memory.empty(2, 8, 8).add(key, value)

    again = memory.add(key, value - memory.read(key)[0])

    assert_near(again.content, memory.content)
    assert_near(again.mass, 2 * memory.mass)


def test_a_text_of_any_length_leaves_a_memory_of_the_same_size_and_uses_the_same_blocks() -> None:
    query, key, value = text(8, 80)
    caches = empty(4, 4, 2, 8)

    _, memory = example.run(query, key, value, caches, int32(3, 1), example.by_lse)

    assert (memory.content.shape, memory.mass.shape) == ((2, 8, 8), (2, 8))
    assert caches[0].isnan().flatten(1).any(1).tolist() == [True, False, True, False]
