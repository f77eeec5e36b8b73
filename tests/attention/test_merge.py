"""Partial results over different keys, put together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pagedkv.attention import merge_states

NOTHING = -math.inf


def one(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


def lse(value: float) -> Tensor:
    return torch.tensor([[value]])


def test_equal_weights_give_the_mean() -> None:
    out, total = merge_states(one(1.0, 4.0), lse(0.0), one(3.0, 0.0), lse(0.0))

    assert out.tolist() == [[[2.0, 2.0]]]
    assert total.item() == pytest.approx(math.log(2))


def test_weights_are_the_exponentials_of_the_lse() -> None:
    out, total = merge_states(one(0.0), lse(math.log(3)), one(4.0), lse(0.0))

    assert out.item() == pytest.approx(1.0)
    assert total.item() == pytest.approx(math.log(4))


def test_a_part_that_saw_nothing_changes_nothing_whatever_it_holds() -> None:
    for junk in (5.0, math.nan, math.inf):
        for parts in (
            (one(2.0), lse(0.7), one(junk), lse(NOTHING)),
            (one(junk), lse(NOTHING), one(2.0), lse(0.7)),
        ):
            out, total = merge_states(*parts)
            assert out.item() == 2.0
            assert total.item() == pytest.approx(0.7)


def test_two_parts_that_saw_nothing_are_zeros() -> None:
    out, total = merge_states(one(math.nan), lse(NOTHING), one(7.0), lse(NOTHING))

    assert out.item() == 0.0
    assert total.item() == NOTHING


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_large_scores_do_not_overflow(shift: float) -> None:
    out, total = merge_states(one(1.0), lse(shift), one(3.0), lse(shift))

    assert out.item() == 2.0
    assert total.item() == pytest.approx(shift + math.log(2))


def test_the_result_has_the_first_parts_dtype() -> None:
    out, total = merge_states(one(1.0).bfloat16(), lse(0.0), one(3.0).bfloat16(), lse(0.0))

    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)


def test_merging_halves_is_attention_over_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))

    def attend(part: slice) -> tuple[Tensor, Tensor]:
        return (scores[part].softmax(0) @ values[part]).view(1, 1, 1), scores[part].logsumexp(0).view(1, 1)

    out, total = merge_states(*attend(slice(0, 2)), *attend(slice(2, 6)))

    expected = attend(slice(0, 6))
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(total, expected[1], rtol=0, atol=1e-15)
