"""Filtered distributions are those of transformers' generate."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagedkv.engine.sampling.filters import Filters, draw, token_weights


def weights_of(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p=1.0, min_p=0.0):
    num_rows, vocab_size = logits.shape
    scaled = logits.clone() / temperature
    filters = Filters(
        np.full(num_rows, min(top_k or vocab_size, vocab_size)), np.full(num_rows, top_p), np.full(num_rows, min_p)
    )
    return token_weights(scaled, scaled.amax(-1), filters)


def probabilities(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() / weights.double().sum(-1, keepdim=True)


def reference(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p=1.0, min_p=0.0):
    """What `generate(do_sample=True)` makes of the same settings, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone()).softmax(-1)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    differing = (found > 0) != (expected > 0)
    # Weights are rounded off: tokens that nobody will ever see drawn have 0 here, and there only below 1e-38.
    assert not (differing & ((found > 1e-13) | (expected > 1e-13))).any()
    assert (found - expected).abs().max() < 1e-6


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 50, 1000])
def test_distributions_are_those_of_transformers(settings, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)

    logits = 3 * torch.randn(40, vocab_size, generator=generator)

    assert_same(probabilities(weights_of(logits, **settings)), reference(logits, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_many_tied_logits_stay_as_with_transformers(settings) -> None:
    """Which of them stay is up to an unstable sort there."""
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(200, 60, generator=generator)).round()

    found, expected = probabilities(weights_of(logits, **settings)), reference(logits, **settings)

    assert_same(found.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_tied_logits_stay_as_with_transformers_on_a_stable_sort(settings, monkeypatch) -> None:
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(200, 60, generator=generator)).round()

    assert_same(probabilities(weights_of(logits, **settings)), reference(logits, **settings))


def test_of_equal_logits_top_p_keeps_those_with_the_highest_ids() -> None:
    weights = weights_of(torch.zeros(1, 8), top_p=0.5)

    assert (weights[0] > 0).tolist() == [False, False, False, False, True, True, True, True]


def test_top_k_keeps_all_that_are_tied_with_the_kth() -> None:
    weights = weights_of(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]]), top_k=2)

    assert (weights[0] > 0).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_top_p_finds_its_tokens_however_many_there_are(top_p: float) -> None:
    """Flat distributions, of which thousands of tokens stay, beside steep ones of which a few do."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 20_000, generator=generator) * torch.tensor([[0.1], [8.0], [0.5], [1.0], [2.0], [4.0]])

    found = probabilities(weights_of(logits, top_p=top_p))

    # transformers adds 20,000 float32 up, and is off by a token or so: the reference is the definition in float64.
    exact = logits.double().softmax(-1)
    ordered = exact.sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    expected = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, ordered.indices, before < top_p)
    differing = (found > 0) ^ expected
    assert int(differing.sum()) <= 1
    assert (found - (exact * expected) / (exact * expected).sum(-1, keepdim=True)).abs().max() < 1e-6


def test_rows_are_filtered_each_by_its_own_settings() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(5, 1)
    filters = Filters(
        np.array([4, 2, 4, 4, 3]), np.array([1.0, 1.0, 0.8, 1.0, 0.99]), np.array([0.0, 0.0, 0.0, 0.2, 0.2])
    )

    weights = token_weights(logits.clone(), logits.amax(-1), filters)

    # exp(-1) = 0.37, exp(-2) = 0.14: shares 0.64, 0.24, 0.09, 0.03
    assert (weights > 0).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    top_k=st.integers(1, 20),
    top_p=st.floats(1e-3, 1),
    min_p=st.floats(0, 1),
)
def test_something_is_always_left_and_the_likeliest_is_of_it(logits: list[float], top_k: int, top_p, min_p) -> None:
    row = torch.tensor([logits])

    weights = weights_of(row, top_k=top_k, top_p=top_p, min_p=min_p)

    assert (weights[0][row[0] == row.max()] > 0).any()


def test_forbidden_tokens_have_no_weight() -> None:
    weights = weights_of(torch.tensor([[0.0, -torch.inf, 1.0]]), top_k=3, top_p=0.9999)

    assert weights[0, 1] == 0


def test_sums_of_the_largest_vocabulary_fit() -> None:
    weights = weights_of(torch.zeros(1, 2**22))

    assert int(weights.sum()) == 2**62


def test_drawing_inverts_the_cumulative_distribution() -> None:
    weights = torch.tensor([[0, 2, 0, 1, 1]]).repeat(6, 1)

    tokens = draw(weights, torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2.0**-53], dtype=torch.float64))

    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("total", [3 * 2**60, 2**62, 2**62 - 1, 2**61 + 2**9 - 255, 2**61 + 2**9, 2**53 + 1, 3, 1])
def test_the_largest_random_number_draws_the_last_token_with_a_weight(total: int) -> None:
    """Also where the total is rounded up in float64."""
    weights = torch.tensor([[0, total, 0]])

    assert draw(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [1]


def test_only_tokens_with_a_weight_are_drawn() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(500, 40, generator=generator)).round()
    weights = weights_of(logits, top_k=10, top_p=0.7)
    allowed = weights > 0

    tokens = draw(weights, torch.rand(500, generator=generator, dtype=torch.float64))

    assert allowed.gather(1, tokens[:, None]).all()
