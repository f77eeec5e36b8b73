"""A draft model's guesses are its own greedy tokens, whatever was accepted, dropped, or had to give way before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model
from torch import Tensor

from pagedkv import InvalidArgumentError, UnknownIdError
from pagedkv.engine.speculation import DraftModelDrafter
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.errors import ConfigError

A, B, C = ("a", 0), ("b", 0), ("c", 0)
NUM_NEW = 40
PROMPT_LENGTHS = (5, 17, 33)


@cache
def model_of(family: str = "llama") -> Any:
    return make_model(family)


def make_drafter(
    num_blocks: int = 64, *, num_drafts: int = 4, block_size: int = 4, **options: int
) -> DraftModelDrafter:
    return DraftModelDrafter(model_of(), num_drafts=num_drafts, num_blocks=num_blocks, block_size=block_size, **options)


def text_of(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng((seed, length)).integers(1, VOCABULARY, length).tolist()
    return tokens


def greedy(text: Sequence[int], num_tokens: int, family: str = "llama") -> list[int]:
    """What the model says by itself, without any cache."""
    known = list(text)
    with torch.inference_mode():
        for _ in range(num_tokens):
            known.append(int(model_of(family)(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1].argmax()))
    return known[len(text) :]


def propose(drafter: DraftModelDrafter, *keys: tuple[str, int], limit: int = 64) -> list[list[int]]:
    return [drafts.tolist() for drafts in drafter.propose(keys, [limit] * len(keys))]


def num_used(drafter: DraftModelDrafter) -> int:
    drafter.manager.check_invariants()
    return drafter.manager.statistics().num_used


@contextmanager
def watched(drafter: DraftModelDrafter) -> Iterator[list[int]]:
    """How many tokens each step of the model computes."""
    steps: list[int] = []
    forward = drafter.model.forward

    def counting(step: StepInputs) -> Tensor:
        steps.append(step.token_ids.shape[1])
        return forward(step)

    drafter.model.forward = counting  # type: ignore[method-assign]
    yield steps
    drafter.model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3", "bloom"])
@pytest.mark.parametrize("num_drafts", [1, 4])
def test_the_target_as_its_own_draft_model_is_always_right(family: str, num_drafts: int) -> None:
    texts = {(f"r{length}", 0): text_of(length) for length in PROMPT_LENGTHS}
    answers = {key: greedy(text, NUM_NEW + num_drafts, family) for key, text in texts.items()}
    drafter = DraftModelDrafter(model_of(family), num_drafts=num_drafts, num_blocks=64, block_size=4)
    for key, text in texts.items():
        drafter.begin(key, text)
    done = dict.fromkeys(texts, 0)

    while done:
        keys = list(done)
        for key, drafts in zip(keys, drafter.propose(keys, [num_drafts] * len(keys)), strict=True):
            assert drafts.tolist() == answers[key][done[key] : done[key] + num_drafts]
            drafter.extend(key, answers[key][done[key] : done[key] + num_drafts + 1])
            done[key] += num_drafts + 1
            if done[key] >= NUM_NEW:
                drafter.end(key)
                del done[key]

    assert num_used(drafter) == 0


@pytest.mark.parametrize("max_step", [1, 7, 512])
@pytest.mark.parametrize("num_blocks", [10, 22, 200])
def test_every_guess_is_the_models_own_whatever_happened_before(num_blocks: int, max_step: int) -> None:
    rng = np.random.default_rng((num_blocks, max_step))
    drafter = make_drafter(num_blocks, max_num_batched_tokens=max_step)
    shared, texts = text_of(11), dict[tuple[str, int], list[int]]()
    num_right, num_empty = 0, 0
    for turn in range(40):
        key = (f"r{rng.integers(5)}", 0)
        what = rng.random()
        if what < 0.35 or not texts:
            texts[key] = [*shared[: rng.integers(1, 12)], *text_of(int(rng.integers(0, 14)), turn)]
            drafter.begin(key, texts[key])
        elif what < 0.45:
            drafter.end(key)
            texts.pop(key, None)
        keys = [key for key in texts if rng.random() < 0.7]
        limits = rng.integers(0, 6, len(keys)).tolist()
        for key, limit, drafts in zip(keys, limits, drafter.propose(keys, limits), strict=True):
            expected = greedy(texts[key], min(limit, 4))
            assert drafts.tolist() == expected[: len(drafts)]
            num_right, num_empty = num_right + len(drafts), num_empty + (len(drafts) == 0 < limit)
            # A target that accepts some, and then says something else, perhaps in several steps; sometimes its step failed.
            num_accepted = int(rng.integers(0, len(drafts) + 1))
            if rng.random() < 0.85:
                num_other = int(rng.integers(1, 4))
                new = [*expected[:num_accepted], *rng.integers(1, VOCABULARY, num_other).tolist()]
                drafter.extend(key, new)
                texts[key] += new
        drafter.manager.check_invariants()

    for key in texts:
        drafter.end(key)
    assert num_used(drafter) == 0
    assert num_right > 80
    assert (num_empty > 0) == (num_blocks < 200)


def test_keys_and_values_of_accepted_guesses_are_kept() -> None:
    drafter = make_drafter()
    text = text_of(9)
    answer = greedy(text, 30)
    drafter.begin(A, text)

    with watched(drafter) as steps:
        propose(drafter, A)
        # All 4 accepted, and one more: the last draft was never computed, nor was what follows it.
        drafter.extend(A, answer[:5])
        propose(drafter, A)
        # 1 of 4 accepted, then another token than was guessed.
        drafter.extend(A, [answer[5], 1 + answer[6] % (VOCABULARY - 1)])
        propose(drafter, A)

    assert steps == [9, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_target_that_used_fewer_guesses_confirms_the_others_by_its_own_token() -> None:
    drafter = make_drafter()
    text = text_of(9)
    answer = greedy(text, 9)
    drafter.begin(A, text)
    propose(drafter, A)

    # Two of four guesses were computed by the target; its third token is the third guess.
    drafter.extend(A, answer[:3])

    with watched(drafter) as steps:
        assert propose(drafter, A) == [answer[3:7]]
    assert steps == [1, 1, 1, 1]


def test_all_samples_are_guessed_for_in_the_same_steps() -> None:
    drafter = make_drafter(num_drafts=3)
    for key, length in ((A, 5), (B, 9), (C, 2)):
        drafter.begin(key, text_of(length))

    with watched(drafter) as steps:
        drafts = drafter.propose([A, B, C], [3, 1, 2])

    assert steps == [16, 2, 1]
    assert [len(tokens) for tokens in drafts] == [3, 1, 2]


def test_long_prompts_are_computed_in_steps_of_limited_size() -> None:
    drafter = make_drafter(num_drafts=1, max_num_batched_tokens=8)
    for key, length in ((A, 5), (B, 20)):
        drafter.begin(key, text_of(length))

    with watched(drafter) as steps:
        assert propose(drafter, A, B) == [greedy(text_of(5), 1), greedy(text_of(20), 1)]

    assert steps == [8, 8, 8, 1]


def test_samples_of_one_prompt_compute_its_full_blocks_once() -> None:
    drafter = make_drafter(num_drafts=1)
    for key in (A, B, C):
        drafter.begin(key, text_of(9))

    with watched(drafter) as steps:
        assert propose(drafter, A, B, C) == [greedy(text_of(9), 1)] * 3

    # Blocks of 4: of nine tokens, eight are shared, in the very step that computes them.
    assert steps == [9 + 1 + 1]


def test_samples_of_other_salts_share_nothing() -> None:
    drafter = make_drafter(num_drafts=1)
    drafter.begin(A, text_of(9), salt=b"x")
    drafter.begin(B, text_of(9), salt=b"y")

    with watched(drafter) as steps:
        propose(drafter, A, B)

    assert steps == [18]


def test_guesses_stand_until_the_sample_gets_a_token() -> None:
    drafter = make_drafter()
    drafter.begin(A, text_of(6))
    first = propose(drafter, A)

    with watched(drafter) as steps:
        again, fewer = propose(drafter, A), propose(drafter, A, limit=2)

    assert again == first == [greedy(text_of(6), 4)]
    assert fewer == [first[0][:2]]
    assert steps == []


def test_a_sample_that_begins_again_finds_its_blocks_in_the_cache() -> None:
    drafter = make_drafter(num_drafts=2)
    drafter.begin(A, text_of(10))
    propose(drafter, A)
    drafter.extend(A, text_of(3))

    drafter.begin(A, text_of(10) + text_of(3))

    with watched(drafter) as steps:
        assert propose(drafter, A) == [greedy(text_of(10) + text_of(3), 2)]
    # Two blocks of 4 were full before.
    assert steps == [5, 1]


def test_whoever_does_not_fit_gets_no_guesses_until_there_is_room() -> None:
    # 8 tokens and 3 drafts that are computed need 3 blocks of 4.
    drafter = make_drafter(num_blocks=5)
    drafter.begin(A, text_of(8))
    drafter.begin(B, text_of(8, seed=1))

    assert propose(drafter, A, B) == [greedy(text_of(8), 4), []]
    assert num_used(drafter) == 3
    drafter.extend(B, [7])
    drafter.end(A)
    assert propose(drafter, B) == [greedy([*text_of(8, seed=1), 7], 4)]


def test_whoever_outgrows_the_room_lets_go_of_what_it_holds() -> None:
    drafter = make_drafter(num_blocks=5)
    drafter.begin(A, text_of(8))
    drafter.begin(B, text_of(3))
    assert [len(drafts) for drafts in propose(drafter, A, B)] == [4, 4]

    # Without the wrong guesses they hold 2 and 1 blocks of 5; now they need 5 and 4.
    drafter.extend(A, text_of(6))
    drafter.extend(B, text_of(7))

    assert propose(drafter, A, B) == [[], greedy(text_of(3) + text_of(7), 4)]
    assert num_used(drafter) == 4


def test_a_sample_that_is_not_guessed_for_gives_way() -> None:
    drafter = make_drafter(num_blocks=5)
    drafter.begin(A, text_of(8))
    drafter.begin(B, text_of(8, seed=1))
    propose(drafter, A)

    assert propose(drafter, B) == [greedy(text_of(8, seed=1), 4)]

    drafter.extend(A, [3])
    assert propose(drafter, A) == [greedy([*text_of(8), 3], 4)]


def test_a_sample_larger_than_the_memory_drives_nobody_out() -> None:
    drafter = make_drafter(num_blocks=4)
    drafter.begin(A, text_of(5))
    drafter.begin(B, text_of(30))
    propose(drafter, A)

    with watched(drafter) as steps:
        assert propose(drafter, B) == [[]]
        assert propose(drafter, A) == [greedy(text_of(5), 4)]
    assert steps == []


def test_no_guess_lies_beyond_the_positions_of_the_model() -> None:
    model = make_model("llama", max_position_embeddings=96)
    drafter = DraftModelDrafter(model, num_drafts=4, num_blocks=64, block_size=4)
    for key, length in ((A, 94), (B, 96), (C, 97)):
        drafter.begin(key, text_of(length))

    assert [len(drafts) for drafts in propose(drafter, A, B, C)] == [3, 1, 0]
    assert num_used(drafter) == 24 + 24


@pytest.mark.parametrize("failing_step", [0, 1])
def test_after_a_step_that_raised_guesses_are_right_again(failing_step: int) -> None:
    drafter = make_drafter(max_num_batched_tokens=12)
    drafter.begin(A, text_of(9))
    propose(drafter, A)
    drafter.extend(A, greedy(text_of(9), 5))
    drafter.begin(B, text_of(17))
    forward, num_left = drafter.model.forward, failing_step

    def failing(step: StepInputs) -> Tensor:
        nonlocal num_left
        if num_left == 0:
            raise RuntimeError("the device is gone")
        num_left -= 1
        return forward(step)

    drafter.model.forward = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the device is gone"):
        propose(drafter, A, B)
    drafter.model.forward = forward  # type: ignore[method-assign]

    assert num_used(drafter) == 0
    known = text_of(9) + greedy(text_of(9), 5)
    assert propose(drafter, A, B) == [greedy(known, 4), greedy(text_of(17), 4)]


def test_guesses_end_where_the_logits_are_not_finite() -> None:
    drafter = make_drafter()
    drafter.begin(A, text_of(6))
    drafter.begin(B, text_of(7))
    forward, num_steps = drafter.model.forward, 0

    def spoiled(step: StepInputs) -> Tensor:
        nonlocal num_steps
        logits = forward(step)
        num_steps += 1
        if num_steps == 3:
            logits[0] = torch.nan
        return logits

    drafter.model.forward = spoiled  # type: ignore[method-assign]

    assert propose(drafter, A, B) == [greedy(text_of(6), 2), greedy(text_of(7), 4)]
    drafter.extend(A, greedy(text_of(6), 3))
    assert propose(drafter, A) == [greedy(text_of(6), 7)[3:]]
    drafter.end(A)
    drafter.end(B)
    assert num_used(drafter) == 0


def test_models_of_other_vocabularies_are_refused() -> None:
    drafter = make_drafter()
    drafter.check_target(160)

    with pytest.raises(ConfigError, match="the draft model has logits for 160 tokens, the target for 200"):
        drafter.check_target(200)


def test_the_memory_is_given_in_blocks_or_in_bytes() -> None:
    # 2 layers, keys and values, 2 heads of 16 channels, float32: 512 bytes a token.
    drafter = DraftModelDrafter(model_of(), kv_memory="24KiB")

    assert drafter.manager.config.num_blocks == 3
    for given in ({}, {"num_blocks": 3, "kv_memory": "24KiB"}):
        with pytest.raises(ConfigError, match="either num_blocks or kv_memory"):
            DraftModelDrafter(model_of(), **given)
    with pytest.raises(ConfigError, match=r"num_drafts must be in 1\.\.64, found 0"):
        make_drafter(num_drafts=0)


def test_unknown_samples_are_refused_and_nothing_changes() -> None:
    drafter = make_drafter()
    drafter.begin(A, text_of(5))

    with pytest.raises(UnknownIdError, match=r"no sample \('b', 0\) was begun"):
        propose(drafter, A, B)
    with pytest.raises(UnknownIdError):
        drafter.extend(B, [1])
    with pytest.raises(InvalidArgumentError):
        drafter.begin(A, [])
    drafter.end(B)

    assert propose(drafter, A) == [greedy(text_of(5), 4)]
