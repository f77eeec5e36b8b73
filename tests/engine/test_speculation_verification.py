"""Which drafts are kept, and that what is kept is what plain decoding says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv import InvalidArgumentError
from pagedkv.engine.sampling import Sampler
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.speculation import accept_drafts

VOCABULARY = 12
NOTHING = np.empty(0, np.int32)


def kept_one_by_one(tokens: list[int], drafts: list[int], counts: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The same with a loop, which is how one would say it."""
    num_tokens, places, out = [], [], []
    place, draft = 0, 0
    for count in counts:
        num = 1
        while num <= count and tokens[place + num - 1] == drafts[draft + num - 1]:
            num += 1
        num_tokens.append(num)
        places += range(place, place + num)
        out += tokens[place : place + num]
        place += count + 1
        draft += count
    return num_tokens, places, out


def test_drafts_are_kept_up_to_the_first_that_differs_and_the_token_there_too() -> None:
    # Rows with 3, 0, 2, 2 drafts: the second draft of the first is wrong, all of the third are right, none of the last.
    tokens = np.array([4, 5, 9, 9, 7, 1, 2, 3, 6, 6, 6], np.int32)
    drafts = np.array([4, 8, 9, 1, 2, 0, 6], np.int32)

    accepted = accept_drafts(tokens, drafts, np.array([3, 0, 2, 2]))

    assert accepted.num_tokens.tolist() == [2, 1, 3, 1]
    assert accepted.kept.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert accepted.token_ids.tolist() == [4, 5, 7, 1, 2, 3, 6]


def test_without_drafts_every_token_is_kept() -> None:
    accepted = accept_drafts(np.array([3, 1, 2], np.int32), NOTHING, np.zeros(3, np.int64))

    assert accepted.num_tokens.tolist() == [1, 1, 1]
    assert accepted.token_ids.tolist() == [3, 1, 2]


def test_a_step_without_rows_keeps_nothing() -> None:
    accepted = accept_drafts(NOTHING, NOTHING, np.empty(0, np.int64))

    assert [len(array) for array in accepted] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(50))
def test_the_same_is_kept_as_by_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, rng.integers(1, 40))
    # Two different tokens, so that about half of the drafts come true.
    tokens = rng.integers(0, 2, len(counts) + counts.sum()).astype(np.int32)
    drafts = rng.integers(0, 2, counts.sum()).astype(np.int32)

    accepted = accept_drafts(tokens, drafts, counts)

    assert tuple(array.tolist() for array in accepted) == kept_one_by_one(
        tokens.tolist(), drafts.tolist(), counts.tolist()
    )


@pytest.mark.parametrize(
    ("num_tokens", "num_drafts", "counts", "message"),
    [
        (4, 2, [1, 2], "2 rows with 3 drafts, found 2 drafts and 4 sampled tokens"),
        (4, 3, [1, 2], "2 rows with 3 drafts, found 3 drafts and 4 sampled tokens"),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(
    num_tokens: int, num_drafts: int, counts: list[int], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        accept_drafts(np.zeros(num_tokens, np.int32), np.zeros(num_drafts, np.int32), np.array(counts))


def logits_after(text: list[int]) -> torch.Tensor:
    """A model: (vocab,) logits that depend on the whole text."""
    return torch.from_numpy(np.random.default_rng(text).normal(0.0, 1.5, VOCABULARY).astype(np.float32))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_speculation_keeps_the_very_tokens_of_plain_decoding(temperature: float) -> None:
    params = SamplingParams(max_tokens=60, temperature=temperature, top_p=0.9)
    sampler = Sampler(VOCABULARY)
    for row in (0, 1):
        sampler.seat(row, params, seed=5 + row, num_prompt=1, known_token_ids=np.array([row], np.int32))
    plain = [[0], [1]]
    for step in range(60):
        logits = torch.stack([logits_after(text) for text in plain])
        tokens = sampler.sample(logits, np.array([0, 1]), np.array([step, step])).token_ids
        for text, token in zip(plain, tokens.tolist(), strict=True):
            text.append(token)

    rng = np.random.default_rng(1)
    speculative, num_steps, num_accepted = [[0], [1]], 0, 0
    while min(map(len, speculative)) < 50:
        counts = rng.integers(0, 5, 2)
        # Guesses that are right four times out of five.
        drafts = [plain[row][len(text) : len(text) + counts[row]] for row, text in enumerate(speculative)]
        drafts = [[token if rng.random() < 0.8 else int(rng.integers(VOCABULARY)) for token in run] for run in drafts]
        counts = np.array([len(run) for run in drafts])
        logits = torch.stack(
            [
                logits_after(text + run[:nth])
                for text, run in zip(speculative, drafts, strict=True)
                for nth in range(len(run) + 1)
            ]
        )
        offsets = np.concatenate([np.arange(count + 1) for count in counts])
        num_outputs = np.array([len(text) - 1 for text in speculative]).repeat(counts + 1) + offsets
        tokens = sampler.sample(logits, np.array([0, 1]).repeat(counts + 1), num_outputs).token_ids
        accepted = accept_drafts(tokens, np.array(drafts[0] + drafts[1], np.int32), counts)
        first = int(accepted.num_tokens[0])
        speculative[0] += accepted.token_ids[:first].tolist()
        speculative[1] += accepted.token_ids[first:].tolist()
        num_steps, num_accepted = num_steps + 1, num_accepted + int(accepted.num_tokens.sum()) - 2

    assert all(text[:50] == reference[:50] for text, reference in zip(speculative, plain, strict=True))
    assert num_steps < 40 < num_accepted
