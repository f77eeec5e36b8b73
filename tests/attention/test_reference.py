"""The reference against torch's own attention, and against plain Python one key at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_steps import SmallStep, check_close, naive_attention, small_step
from torch import Tensor

from pagedkv.attention import pack_tree_mask, paged_attention
from pagedkv.attention.reference import visible_keys


def attend(step: SmallStep, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = paged_attention(*step.tensors, return_lse=True, backend="reference", **options)
    return out, lse


def test_a_whole_prompt_is_what_torch_computes() -> None:
    step = small_step((9, 9), group=1)

    expected = torch.nn.functional.scaled_dot_product_attention(
        step.query.transpose(0, 1), step.keys[0].transpose(0, 1), step.values[0].transpose(0, 1), is_causal=True
    )

    torch.testing.assert_close(attend(step)[0], expected.transpose(0, 1), rtol=0, atol=1e-14)


def test_grouped_decodes_are_what_torch_computes() -> None:
    step = small_step((1, 9), (1, 5), group=3)

    for seq_idx in range(2):
        expected = torch.nn.functional.scaled_dot_product_attention(
            step.query[seq_idx, :, None],
            step.keys[seq_idx].transpose(0, 1),
            step.values[seq_idx].transpose(0, 1),
            enable_gqa=True,
        )
        torch.testing.assert_close(attend(step)[0][seq_idx], expected[:, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"scale": 0.3},
        {"window": (2, 0)},
        {"window": (0, None)},
        {"window": (3, 2), "causal": False},
        {"window": (None, 1), "causal": False},
        {"softcap": 0.5},
        {"softcap": 0.5, "window": (4, 0), "scale": 2.0},
    ],
    ids=str,
)
def test_masks_and_soft_caps_are_those_of_plain_python(options: dict[str, Any]) -> None:
    step = small_step((3, 7), (1, 5), (4, 4))

    check_close(attend(step, **options), naive_attention(step, **options))


def test_a_sink_joins_the_denominator_and_the_lse() -> None:
    step = small_step((2, 5), (1, 1))
    sinks = torch.tensor([0.0, 1.5, -torch.inf, -2.0])

    check_close(attend(step, sinks=sinks), naive_attention(step, sinks=sinks))


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_takes_off_the_distance_on_either_side(causal: bool) -> None:
    step = small_step((3, 6))
    slopes = torch.tensor([0.5, 0.25, 2.0, 0.0])

    check_close(
        attend(step, alibi_slopes=slopes, causal=causal), naive_attention(step, alibi_slopes=slopes, causal=causal)
    )


def test_alibi_is_added_after_the_soft_cap() -> None:
    step = small_step((1, 6))
    options: dict[str, Any] = {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 0.0]), "softcap": 0.5}

    check_close(attend(step, **options), naive_attention(step, **options))


def test_a_tree_hides_siblings_and_shows_the_cached_prefix() -> None:
    step = small_step((1, 3), (3, 6))
    # Tokens 1 and 2 of the second sequence both follow its token 0.
    sees = torch.tensor([[True, False, False], [True, False, False], [True, True, False], [True, False, True]])

    check_close(attend(step, tree_mask=pack_tree_mask(sees)), naive_attention(step, sees=sees))


def test_a_tree_of_more_than_32_tokens_uses_the_second_word() -> None:
    step = small_step((34, 36), num_kv_heads=1, group=1)
    sees = torch.eye(34, dtype=torch.bool)
    sees[33, [0, 31, 32]] = True

    check_close(attend(step, tree_mask=pack_tree_mask(sees)), naive_attention(step, sees=sees))


def test_sequences_without_query_tokens_take_no_part() -> None:
    step = small_step((0, 6), (1, 5), (0, 0), (2, 3), (0, 1))

    check_close(attend(step), naive_attention(step))


def test_a_batch_without_query_tokens_gives_nothing() -> None:
    out, lse = attend(small_step((0, 6)))

    assert out.shape == (0, 4, 8)
    assert lse.shape == (0, 4)


def test_a_batch_without_sequences_gives_nothing() -> None:
    assert attend(small_step())[0].shape == (0, 4, 8)


def test_queries_beyond_the_start_of_a_sequence_see_nothing() -> None:
    step = small_step((4, 2))

    out, lse = attend(step)

    assert out[:2].tolist() == torch.zeros(2, 4, 8).tolist()
    assert lse[:2].tolist() == [[-torch.inf] * 4] * 2
    check_close((out, lse), naive_attention(step))


def test_an_empty_sequence_has_zeros_and_an_lse_of_the_sink() -> None:
    step = small_step((1, 0))
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf])

    out, lse = attend(step, sinks=sinks)

    assert not out.any()
    assert lse.tolist() == [[0.5, -1.0, 2.0, -torch.inf]]


def test_entries_behind_the_window_are_not_read() -> None:
    step = small_step((1, 11))
    expected = attend(step, window=(2, 0))
    step.block_tables[0, :2] = torch.tensor([2**31 - 1, -5])

    check_close(attend(step, window=(2, 0)), expected)


@pytest.mark.parametrize("block_size", [1, 3, 256])
def test_blocks_of_any_size(block_size: int) -> None:
    step = small_step((2, 7), (1, 3), block_size=block_size)

    check_close(attend(step), naive_attention(step))


def test_a_cache_of_heads_before_tokens_is_read_through_its_strides() -> None:
    step = small_step((2, 7), layout="hnd")

    assert step.key_cache.stride() == (64, 8, 32, 1)
    check_close(attend(step), naive_attention(step))


def test_the_values_of_a_latent_cache_are_a_view_of_its_keys() -> None:
    step = small_step((2, 7), num_kv_heads=1, group=4, head_dim=9, value_dim=6, layout="latent")

    check_close(attend(step), naive_attention(step))


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    for value_dim in (3, 20):
        step = small_step((2, 7), value_dim=value_dim)
        check_close(attend(step), naive_attention(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_only_at_the_end(dtype: torch.dtype) -> None:
    step = small_step((2, 7), dtype=dtype)

    out, lse = attend(step)

    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected = naive_attention(step)
    torch.testing.assert_close(out, expected[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-5)


def test_visible_keys_are_aligned_bottom_right() -> None:
    assert visible_keys(2, 3, causal=True, window=(-1, -1)).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert visible_keys(3, 2, causal=True, window=(-1, -1)).int().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert visible_keys(1, 4, causal=False, window=(1, 0)).int().tolist() == [[0, 0, 1, 1]]


def test_results_have_no_gradient_and_out_may_be_a_leaf_that_wants_one() -> None:
    step = small_step((2, 5))
    query = step.query.clone().requires_grad_()
    out = torch.empty_like(query).detach().requires_grad_()

    result = paged_attention(query, *step.tensors[1:], backend="reference")
    paged_attention(query, *step.tensors[1:], out=out, backend="reference")

    assert not result.requires_grad
    assert torch.equal(out, result)
