"""Every value outside its range is refused with one clear line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidArgumentError

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be in 0..67108864, found -1"),
        ({"max_tokens": 1.0}, "max_tokens must be a whole number, found 1.0"),
        ({"max_tokens": True}, "max_tokens must be a whole number, found True"),
        ({"max_tokens": 2**26 + 1}, "max_tokens must be in 0..67108864, found 67108865"),
        ({"min_tokens": -1}, "min_tokens must be in 0..67108864, found -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 exceeds max_tokens 8"),
        ({"temperature": NAN}, "temperature must be in 0..100000, found nan"),
        ({"temperature": float("inf")}, "temperature must be in 0..100000, found inf"),
        ({"temperature": -0.1}, "temperature must be in 0..100000, found -0.1"),
        ({"temperature": 1e-6}, "temperature must be 0 or at least 1e-05, found 1e-06"),
        ({"temperature": True}, "temperature must be a number, found True"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"top_k": 0}, r"top_k \(None: no limit\) must be in 1..2147483647, found 0"),
        ({"top_k": -1}, r"top_k \(None: no limit\) must be in 1..2147483647, found -1"),
        ({"top_k": True}, "must be a whole number, found True"),
        ({"top_p": 0.0}, "top_p must be above 0; temperature=0 takes the likeliest token"),
        ({"top_p": 1.01}, "top_p must be in 0..1, found 1.01"),
        ({"top_p": NAN}, "top_p must be in 0..1, found nan"),
        ({"min_p": -0.1}, "min_p must be in 0..1, found -0.1"),
        ({"min_p": 1.1}, "min_p must be in 0..1, found 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in 0.001..1000, found 0.0"),
        ({"repetition_penalty": NAN}, "repetition_penalty must be in 0.001..1000, found nan"),
        ({"presence_penalty": 101}, "presence_penalty must be in -100..100, found 101"),
        ({"frequency_penalty": NAN}, "frequency_penalty must be in -100..100, found nan"),
        ({"n": 0}, "n must be in 1..1024, found 0"),
        ({"n": 1025}, "n must be in 1..1024, found 1025"),
        ({"seed": -1}, "seed must be in 0..18446744073709551615, found -1"),
        ({"seed": 2**64}, "seed must be in 0..18446744073709551615"),
        ({"seed": True}, "seed must be a whole number, found True"),
        ({"stop": ""}, "stop must hold str of 1 to 1024 characters, found ''"),
        ({"stop": ["a", ""]}, "stop must hold str of 1 to 1024 characters, found ''"),
        ({"stop": ["a", 1]}, "stop must hold str of 1 to 1024 characters, found 1"),
        ({"stop": 5}, "stop must be a str or several, found 5"),
        ({"stop": None}, "stop must be a str or several, found None"),
        ({"stop": "a" * 1025}, "stop must hold str of 1 to 1024 characters"),
        ({"stop": ["a"] * 65}, "at most 64 stop strings, found 65"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be in 0..2147483647, found -1"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be a whole number, found True"),
        ({"stop_token_ids": 3}, "stop_token_ids must be whole numbers, found 3"),
        ({"stop_token_ids": b"ab"}, "stop_token_ids must be whole numbers, found b'ab'"),
        ({"stop_token_ids": range(1025)}, "at most 1024 stop_token_ids, found 1025"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, found 1"),
        ({"include_stop_in_text": None}, "include_stop_in_text must be True or False, found None"),
        ({"logprobs": -1}, "logprobs must be in 0..2147483647, found -1"),
        ({"logprobs": True}, "logprobs must be a whole number, found True"),
        ({"logit_bias": 5}, "logit_bias must be numbers by token, found 5"),
        ({"logit_bias": {5: "a"}}, "logit_bias must be a number, found 'a'"),
        ({"logit_bias": {5: 101}}, "logit_bias must be in -100..100, found 101"),
        ({"logit_bias": {"5": 1}}, "logit_bias must be a whole number, found '5'"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "at most 1024 logit_bias, found 1025"),
        ({"allowed_token_ids": []}, "at least one token"),
        ({"allowed_token_ids": "ab"}, "allowed_token_ids must be whole numbers, found 'ab'"),
        ({"logits_processor": "x"}, "logits_processor must be callable, found 'x'"),
    ],
)
def test_a_value_outside_its_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 10**5000},
        {"presence_penalty": -(10**5000)},
        {"temperature": "a" * 10**6},
        {"stop": "a" * 10**6},
        {"stop_token_ids": "a" * 10**6},
        {"ignore_eos": "a" * 10**6},
        {"logits_processor": "a" * 10**6},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_huge_value_is_refused_without_being_printed(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**values)

    assert len(str(caught.value)) < 150


def test_the_ends_of_each_range_are_accepted() -> None:
    SamplingParams(max_tokens=0, min_tokens=0, temperature=0, top_k=1, top_p=1, min_p=0, seed=0, logprobs=0)
    SamplingParams(max_tokens=2**26, min_tokens=2**26, temperature=1e5, top_k=2**31 - 1, top_p=1e-9, min_p=1, n=1024)
    SamplingParams(
        temperature=1e-5, repetition_penalty=1e3, presence_penalty=-100, frequency_penalty=100, seed=2**64 - 1
    )


def test_values_are_kept_in_one_type_each() -> None:
    params = SamplingParams(
        max_tokens=np.int64(4), temperature=np.float32(0.5), top_p=1, stop=["a", "b"], stop_token_ids={7}
    )

    assert repr((params.max_tokens, params.temperature, params.top_p)) == "(4, 0.5, 1.0)"
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (7,)


def test_they_compare_by_value_and_do_not_change() -> None:
    params = SamplingParams(stop="a")

    assert params == SamplingParams(stop=("a",))
    assert hash(params) == hash(SamplingParams(stop=["a"]))
    biased = SamplingParams(logit_bias={7: 1, 5: -1}, allowed_token_ids=[5, 7])
    assert biased == replace(biased, logit_bias=((7, 1.0), (5, -1.0)))
    assert hash(biased) == hash(replace(biased))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "needs_history"),
    [
        ({}, False),
        ({"temperature": 1.0}, False),
        ({"min_tokens": 1}, False),
        ({"logprobs": 0}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -1}, True),
        ({"frequency_penalty": 1}, True),
        ({"logits_processor": lambda known, logits: logits}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3, "stop": "x", "n": 2}, False),
    ],
)
def test_penalties_and_processors_need_the_tokens_before(values: dict[str, Any], needs_history: bool) -> None:
    params = SamplingParams(**({"temperature": 0} | values))

    assert params.needs_history is needs_history
