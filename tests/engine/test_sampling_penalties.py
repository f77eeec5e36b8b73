"""Penalties and logits processors see every token that a row knows, and no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from pagedkv.engine.sampling.history import TokenHistory, apply_penalties
from pagedkv.engine.sampling_params import SamplingParams


def history_of(params: SamplingParams, prompt: list[int], output: list[int], vocab_size: int = 6) -> TokenHistory:
    known = np.array(prompt + output, np.int32)
    return TokenHistory(params, known, num_prompt=len(prompt), vocab_size=vocab_size)


def penalised(logits: list[float], history: TokenHistory) -> list[float]:
    row = torch.tensor([logits])
    apply_penalties(row, np.array([0]), [history])
    return row[0].tolist()


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    history = history_of(SamplingParams(repetition_penalty=2.0), prompt=[0, 1, 0], output=[3, 3])

    assert penalised([4.0, -4.0, 4.0, 1.0, 1.0, 0.0], history) == [2.0, -8.0, 4.0, 0.5, 1.0, 0.0]


def test_frequency_counts_the_output_alone() -> None:
    history = history_of(SamplingParams(frequency_penalty=0.5), prompt=[0, 1, 3], output=[3, 3, 5])

    assert penalised([1.0] * 6, history) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.5]


def test_presence_is_taken_off_once() -> None:
    history = history_of(SamplingParams(presence_penalty=0.25), prompt=[0, 1], output=[3, 3, 5])

    assert penalised([1.0] * 6, history) == [1.0, 1.0, 1.0, 0.75, 1.0, 0.75]


def test_repetition_comes_before_presence_and_frequency() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)

    assert penalised([4.0, 4.0, 4.0], history_of(params, prompt=[0], output=[1, 1], vocab_size=3)) == [2.0, 0.0, 4.0]


def test_repetition_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, 300, (5, 80), generator=generator)
    logits = 4 * torch.randn(5, 200, generator=generator)
    params = SamplingParams(repetition_penalty=1.3)
    histories = [history_of(params, row[:50].tolist(), row[50:].tolist(), 200) for row in known]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(known, logits)

    found = logits.clone()
    apply_penalties(found, np.arange(5), histories)

    assert (found - expected).abs().max() < 1e-6


def test_tokens_that_come_later_count_as_those_known_from_the_start() -> None:
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    output = np.random.default_rng(0).integers(0, 20, 200).tolist()
    later = history_of(params, [1, 2], [], 20)
    for token_id in output:
        later.append(token_id)

    at_once = history_of(params, [1, 2], output, 20)

    assert later.num_outputs == at_once.num_outputs == 200
    assert later.token_ids.tolist() == at_once.token_ids.tolist()
    assert later.output_counts.tolist() == at_once.output_counts.tolist()
    assert later.known_token_ids.tolist() == [1, 2, *output]


def test_rows_are_penalised_each_by_its_own_history() -> None:
    logits = torch.ones(3, 4)
    histories = [
        history_of(SamplingParams(presence_penalty=1.0), [], [0], 4),
        history_of(SamplingParams(presence_penalty=2.0), [], [1, 2], 4),
    ]

    apply_penalties(logits, np.array([0, 2]), histories)

    assert logits.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, -1, -1, 1]]


def test_a_history_without_tokens_changes_nothing() -> None:
    assert penalised([1.0, 2.0], history_of(SamplingParams(presence_penalty=1.0), [0], [], 2)) == [1.0, 2.0]


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty"])
def test_prompt_tokens_beyond_the_vocabulary_are_known_but_not_penalised(penalty: str) -> None:
    history = history_of(SamplingParams(**{penalty: 2.0}), prompt=[9], output=[0], vocab_size=2)

    penalised([1.0, 1.0], history)

    assert history.token_ids.tolist() == [0]
    assert history.known_token_ids.tolist() == [9, 0]
