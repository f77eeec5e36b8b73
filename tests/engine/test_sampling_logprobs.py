"""Log-probabilities are of the model's own distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pagedkv.engine.sampling import Sampler, TokenLogprobs
from pagedkv.engine.sampling.logprobs import token_logprobs
from pagedkv.engine.sampling_params import SamplingParams


def lookup(logits: list[list[float]], tokens: list[int], num_alternatives: list[int]) -> list[TokenLogprobs]:
    return token_logprobs(torch.tensor(logits), torch.tensor(tokens), np.array(num_alternatives))


def test_of_a_token_its_probability_and_rank_are_told() -> None:
    (entry,) = lookup([[math.log(0.1), math.log(0.6), math.log(0.3)]], [2], [0])

    assert entry.token_id == 2
    assert entry.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert entry.rank == 2
    assert entry.alternatives == {}


def test_alternatives_come_best_first_as_many_as_each_row_asked_for() -> None:
    row = [math.log(0.1), math.log(0.6), math.log(0.3)]
    first, second, third = lookup([row, row, row], [0, 0, 0], [2, 0, 3])

    assert list(first.alternatives) == [1, 2]
    assert list(first.alternatives.values()) == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-6)
    assert second.alternatives == {}
    assert list(third.alternatives) == [1, 2, 0]


def test_equal_tokens_share_a_rank_and_stand_by_id() -> None:
    (entry,) = lookup([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]], [4], [4])

    assert entry.rank == 4
    assert list(entry.alternatives) == [1, 3, 5, 0]


def test_many_equal_tokens_stand_by_id() -> None:
    (entry,) = lookup([[0.0] * 3000], [2999], [3])

    assert list(entry.alternatives) == [0, 1, 2]


def test_impossible_tokens_are_no_alternatives() -> None:
    (entry,) = lookup([[0.0, -torch.inf, -torch.inf]], [0], [3])

    assert entry.alternatives == {0: 0.0}


def test_they_agree_with_log_softmax() -> None:
    logits = 5 * torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 500, (20,), generator=torch.Generator().manual_seed(1))
    expected = logits.double().log_softmax(-1)

    for row, entry in enumerate(token_logprobs(logits, tokens, np.full(20, 5))):
        token = int(tokens[row])
        order = expected[row].argsort(descending=True).tolist()
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert entry.rank == order.index(token) + 1
        assert list(entry.alternatives) == order[:5]


def test_penalties_and_temperature_do_not_change_them() -> None:
    sampler = Sampler(3)
    params = SamplingParams(temperature=0.1, presence_penalty=100.0, min_tokens=1, logprobs=3)
    sampler.seat(0, params, seed=0, num_prompt=0, known_token_ids=np.array([], np.int32), end_token_ids=(1,))
    logits = torch.tensor([[math.log(0.1), math.log(0.6), math.log(0.3)]])

    sampled = sampler.sample(logits, np.array([0]), np.array([0]))

    assert sampled.logprobs is not None
    (entry,) = sampled.logprobs
    assert entry is not None
    assert entry.token_id == sampled.token_ids[0] == 2
    assert entry.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert entry.rank == 2
    assert list(entry.alternatives) == [1, 2, 0]


def test_rows_that_did_not_ask_get_none() -> None:
    sampler = Sampler(2)
    for row, params in enumerate(
        [SamplingParams(temperature=0), SamplingParams(logprobs=0), SamplingParams(temperature=0, logprobs=1)]
    ):
        sampler.seat(row, params, seed=0, num_prompt=0, known_token_ids=np.empty(0, np.int32))

    sampled = sampler.sample(torch.tensor([[0.0, 1.0]] * 3), np.array([2, 0, 1]), np.zeros(3, np.int64))

    assert sampled.logprobs is not None
    first, second, third = sampled.logprobs
    assert first is not None
    assert list(first.alternatives) == [1]
    assert second is None
    assert third is not None
    assert third.alternatives == {}
