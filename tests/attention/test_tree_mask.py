"""Bits of tree masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_steps import small_step

from pagedkv.attention import AttentionArgumentError, pack_tree_mask, paged_attention, plan, tree_mask_from_parents

SIGN_BIT = -(2**31)


def starts(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_bit_j_says_whether_query_token_j_is_seen() -> None:
    packed = pack_tree_mask(torch.tensor([[True, False, False], [True, True, False], [True, False, True]]))

    assert packed.tolist() == [[0b001], [0b011], [0b101]]
    assert packed.dtype == torch.int32


def test_the_thirty_second_bit_is_the_sign_and_the_next_starts_a_word() -> None:
    visible = torch.zeros(3, 33, dtype=torch.bool)
    visible[0, 31] = visible[1, 32] = True
    visible[2] = True

    assert pack_tree_mask(visible).tolist() == [[SIGN_BIT, 0], [0, 1], [-1, 1]]


def test_thirty_two_tokens_need_one_word() -> None:
    assert pack_tree_mask(torch.ones(2, 32, dtype=torch.bool)).tolist() == [[-1], [-1]]


def test_no_tokens_pack_to_no_rows() -> None:
    assert pack_tree_mask(torch.zeros(0, 0, dtype=torch.bool)).shape == (0, 1)


@pytest.mark.parametrize("visible", [torch.zeros(3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.int32)])
def test_what_is_no_table_of_booleans_is_refused(visible: torch.Tensor) -> None:
    with pytest.raises(AttentionArgumentError, match="visible must be 2-D bool"):
        pack_tree_mask(visible)


def test_a_token_sees_its_ancestors_and_itself() -> None:
    #   0 - 1 - 3
    #     \ 2 - 4
    mask = tree_mask_from_parents(np.array([-1, 0, 0, 1, 2], np.int32), starts(0, 5))

    assert mask.tolist() == [[0b00001], [0b00011], [0b00101], [0b01011], [0b10101]]


def test_parents_count_from_the_start_of_their_own_sequence() -> None:
    mask = tree_mask_from_parents(torch.tensor([-1, 0, -1, -1, 1], dtype=torch.int32), torch.tensor([0, 2, 2, 5]).int())

    assert mask.tolist() == [[0b1], [0b11], [0b1], [0b10], [0b110]]


def test_a_chain_of_34_fills_the_first_word() -> None:
    mask = tree_mask_from_parents(np.arange(-1, 33, dtype=np.int32), starts(0, 34))

    assert mask[31].tolist() == [-1, 0]
    assert mask[33].tolist() == [-1, 0b11]


def test_a_mask_from_parents_is_the_packed_table() -> None:
    sees = torch.tensor([[True, False], [True, True]])

    assert torch.equal(tree_mask_from_parents(np.array([-1, 0], np.int32), starts(0, 2)), pack_tree_mask(sees))


@pytest.mark.parametrize(
    ("parents", "query_start_loc", "message"),
    [
        ([0], (0, 1), r"parents\[0\] = 0 must be -1 or stand before query token 0"),
        ([-1, -2], (0, 2), r"parents\[1\] = -2"),
        ([-1, 0, 0], (0, 2, 3), r"parents\[2\] = 0 must be -1 or stand before query token 0"),
        ([-1, 0], (0, 1), r"end with the number of parents \(2\)"),
        ([-1, 0], (1, 2), "start with 0"),
        ([-1, 0], (0, 2, 1, 2), "never fall"),
        ([-1], (), "query_start_loc"),
    ],
)
def test_what_is_no_tree_is_refused(parents: list[int], query_start_loc: tuple[int, ...], message: str) -> None:
    with pytest.raises(AttentionArgumentError, match=message):
        tree_mask_from_parents(np.array(parents, np.int32), starts(*query_start_loc))


def test_parents_of_another_dtype_are_refused() -> None:
    with pytest.raises(AttentionArgumentError, match="parents must be 1-D int32, found int64"):
        tree_mask_from_parents(np.array([-1]), starts(0, 1))  # type: ignore[arg-type]


def test_a_mask_with_too_few_words_is_refused_with_and_without_a_plan() -> None:
    step = small_step((33, 40))
    tree_mask = torch.zeros(33, 1, dtype=torch.int32)
    made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend="reference")

    for options in ({"plan": made}, {"backend": "reference"}):
        with pytest.raises(AttentionArgumentError, match="1 words of 32 bits, but a sequence has 33 query tokens"):
            paged_attention(*step.tensors, tree_mask=tree_mask, **options)
