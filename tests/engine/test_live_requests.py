"""What ends the text of a sample, and what is told of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import make_tokenizer

from pagedkv.engine import Completion, SamplingParams
from pagedkv.engine.live_requests import LiveRequest, LiveSample


class Letters:
    """A token for each letter; 0 is a character's first byte."""

    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - nobody changes it

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(chr(token_id) if token_id else "\ufffd" for token_id in token_ids)


def make_sample(params: SamplingParams, tokenizer: Any = None) -> LiveSample:
    request = LiveRequest(
        "a",
        np.array([65], np.int32),
        params,
        seed=0,
        arrival_s=0.0,
        prompt=None,
        salt=b"",
        on_piece=None,
        on_finish=lambda _: None,
    )
    return LiveSample(request, 0, tokenizer or Letters(), frozenset())


def complete(text: str, params: SamplingParams) -> Completion:
    """What becomes of a sample that gets the letters of a text, a token each, until it stops."""
    sample, token_ids = make_sample(params), [ord(letter) if letter != "\ufffd" else 0 for letter in text]
    for num_tokens, token_id in enumerate(token_ids, start=1):
        if sample.push(token_id, None):
            return sample.finish(np.array(token_ids[:num_tokens], np.int32), "stop")
    return sample.finish(np.array(token_ids, np.int32), "length")


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "expected"),
    [
        ("xxabyy", "ab", 3, ("xx", "ab")),
        ("xxabyy", "ab", 4, ("xx", "ab")),  # Begun with the third token, complete with the fourth.
        ("xxabyy", "ab", 5, ("xxabyy", None)),
        ("xxabyab", "ab", 5, ("xxaby", "ab")),
        ("aaaay", "aa", 3, ("a", "aa")),
        ("abcd", ("ab", "abc"), 3, ("", "abc")),
        ("abcd", ("bc", "bcd"), 4, ("a", "bcd")),
        ("ababc", ("ab", "abc"), 5, ("ab", "abc")),
    ],
)
def test_a_stop_string_counts_if_it_is_complete_with_the_least_number_of_tokens(
    text: str, stop: Any, min_tokens: int, expected: tuple[str, str | None]
) -> None:
    completion = complete(text, SamplingParams(stop=stop, min_tokens=min_tokens))

    assert (completion.text, completion.stop) == expected


def test_a_stop_in_text_that_only_the_end_makes_final_is_told() -> None:
    completion = complete("x\ufffd", SamplingParams(stop="\ufffd"))

    assert (completion.text, completion.finish_reason, completion.stop) == ("x", "stop", "\ufffd")


@pytest.mark.parametrize(("skip", "text"), [(True, "xy"), (False, "x<|user|>y")])
def test_special_tokens_are_in_the_text_if_they_are_asked_for(skip: bool, text: str) -> None:
    tokenizer = make_tokenizer()
    params = SamplingParams(skip_special_tokens=skip)
    sample = make_sample(params, tokenizer)
    token_ids = tokenizer("x<|user|>y")["input_ids"]

    assert sample.finish(np.array(token_ids, np.int32), "length").text == text
