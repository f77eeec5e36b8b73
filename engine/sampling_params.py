"""How the tokens of a request are chosen, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from pagedkv.arrays import MAX_TOKEN_ID, Int32s, as_int, shown
from pagedkv.content import MAX_TOKENS
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler.request import MAX_SAMPLES, MAX_STOP_TOKENS

__all__ = [
    "MAX_SEED",
    "MAX_STOP_CHARACTERS",
    "MAX_STOP_STRINGS",
    "MIN_TEMPERATURE",
    "LogitsProcessor",
    "SamplingParams",
    "as_number",
    "check_bool",
]

LogitsProcessor: TypeAlias = Callable[[Int32s, torch.Tensor], torch.Tensor]
"""(known token ids with the prompt (n,) int32, logits (vocab,) float32) -> logits (vocab,)."""

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 2**22
MAX_SEED = 2**64 - 1
MIN_TEMPERATURE = 1e-5
"""Below this, logits divided by the temperature leave the range of float32 or lose their order; 0 is exact instead."""
MAX_TEMPERATURE = 1e5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. The distributions are those of transformers' `generate`, filter by filter.

    max_tokens:           output tokens at most, 0..2^26
    min_tokens:           output tokens before any end or stop token may be chosen, 0..max_tokens; a stop string counts
                          if it is complete with that many or more
    temperature:          0 takes the likeliest token; else 1e-5..1e5
    top_k:                choose among the k likeliest tokens (and those tied with the last of them); None: among all
    top_p:                choose among the likeliest tokens that together hold this probability, 0 < top_p <= 1
    min_p:                choose among tokens at least this fraction as likely as the likeliest, 0..1
    logit_bias:           {token: number in -100..100}, added to the logits of up to 1024 tokens, before any penalty
    allowed_token_ids:    choose among these tokens only; None: among all
    repetition_penalty:   logits of tokens in prompt or output are divided by it if positive, else multiplied; 1e-3..1e3
    presence_penalty:     taken off the logits of tokens in the output, -100..100
    frequency_penalty:    taken off the logits for each time that the token is in the output, -100..100
    n:                    samples of the prompt, 1..1024
    seed:                 the same seed gives the same tokens, whatever else runs; 0..2^64-1, or None: the engine's
    choice
    stop:                 a string, or up to 64 of them, of 1..1024 characters, that end the text
    stop_token_ids:       up to 1024 tokens that end the sample, as the model's own end tokens do
    ignore_eos:           the model's own end tokens do not end the sample
    include_stop_in_text: the stop string stays in the text
    skip_special_tokens:  special tokens have no text; False for those who parse them, such as calls of tools
    logprobs:             how many alternatives to report with the log-probability of each token; None: none, nor its
    own
    logits_processor:     changes one sample's logits after penalties, before the temperature, but not what min_tokens
                          forbids: (known token ids with the prompt (n,) int32, logits (vocab,) float32) -> logits (vocab,)

    Raises InvalidArgumentError for a value outside its range, and for min_tokens above max_tokens.

    >>> SamplingParams(temperature=0.7, top_p=0.9, stop="END").stop
    ('END',)
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    allowed_token_ids: Iterable[int] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    include_stop_in_text: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._set("stop", _as_stops(self.stop))
        self._set("stop_token_ids", _as_tokens("stop_token_ids", self.stop_token_ids, at_most=MAX_STOP_TOKENS))
        self._set("logit_bias", _as_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _as_tokens("allowed_token_ids", self.allowed_token_ids, at_most=MAX_ALLOWED_TOKENS)
            if not allowed:
                raise InvalidArgumentError("allowed_token_ids must hold at least one token; None allows all")
            self._set("allowed_token_ids", allowed)
        for name in ("ignore_eos", "include_stop_in_text", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise InvalidArgumentError(f"logits_processor must be callable, found {shown(self.logits_processor)}")

    def _check_counts(self) -> None:
        self._set("max_tokens", as_int("max_tokens", self.max_tokens, at_least=0, at_most=MAX_TOKENS))
        self._set("min_tokens", as_int("min_tokens", self.min_tokens, at_least=0, at_most=MAX_TOKENS))
        if self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        self._set("n", as_int("n", self.n, at_least=1, at_most=MAX_SAMPLES))
        if self.top_k is not None:
            self._set("top_k", as_int("top_k (None: no limit)", self.top_k, at_least=1, at_most=MAX_TOKEN_ID))
        if self.seed is not None:
            self._set("seed", as_int("seed", self.seed, at_least=0, at_most=MAX_SEED))
        if self.logprobs is not None:
            self._set("logprobs", as_int("logprobs", self.logprobs, at_least=0, at_most=MAX_TOKEN_ID))

    def _check_numbers(self) -> None:
        temperature = as_number("temperature", self.temperature, at_least=0.0, at_most=MAX_TEMPERATURE)
        if 0 < temperature < MIN_TEMPERATURE:
            raise InvalidArgumentError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, found {temperature}")
        self._set("temperature", temperature)
        top_p = as_number("top_p", self.top_p, at_least=0.0, at_most=1.0)
        if top_p == 0:
            raise InvalidArgumentError("top_p must be above 0; temperature=0 takes the likeliest token")
        self._set("top_p", top_p)
        self._set("min_p", as_number("min_p", self.min_p, at_least=0.0, at_most=1.0))
        repetition = as_number("repetition_penalty", self.repetition_penalty, at_least=1e-3, at_most=1e3)
        self._set("repetition_penalty", repetition)
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, as_number(name, getattr(self, name), at_least=-100.0, at_most=100.0))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens known so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_bias(self) -> bool:
        """Whether single tokens are made likelier, less likely or impossible."""
        return self.logit_bias != () or self.allowed_token_ids is not None

    @property
    def needs_history(self) -> bool:
        """Whether a token depends on the token ids before it, other than through the model."""
        return self.has_penalties or self.logits_processor is not None


def check_bool(name: str, value: object) -> None:
    """Raise InvalidArgumentError unless it is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be True or False, found {shown(value)}")


def as_number(name: str, value: object, *, at_least: float, at_most: float) -> float:
    """Return `value` as a float. Raises InvalidArgumentError unless it is a number in this range; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise InvalidArgumentError(f"{name} must be a number, found {shown(value)}")
    if not at_least <= value <= at_most:  # Nor is this so of NaN.
        raise InvalidArgumentError(f"{name} must be in {at_least:g}..{at_most:g}, found {shown(value)}")
    return float(value)


def _as_stops(stop: str | Iterable[str]) -> tuple[str, ...]:
    try:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
    except TypeError:
        raise InvalidArgumentError(f"stop must be a str or several, found {shown(stop)}") from None
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidArgumentError(f"at most {MAX_STOP_STRINGS} stop strings, found {len(stops)}")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidArgumentError(
                f"stop must hold str of 1 to {MAX_STOP_CHARACTERS} characters, found {shown(text)}"
            )
    return stops


def _as_tokens(name: str, values: Iterable[int], *, at_most: int) -> tuple[int, ...]:
    if isinstance(values, str | bytes):  # Bytes would pass as whole numbers.
        raise InvalidArgumentError(f"{name} must be whole numbers, found {shown(values)}")
    try:
        token_ids = tuple(values)
    except TypeError:
        raise InvalidArgumentError(f"{name} must be whole numbers, found {shown(values)}") from None
    if len(token_ids) > at_most:
        raise InvalidArgumentError(f"at most {at_most} {name}, found {len(token_ids)}")
    return tuple(as_int(name, token_id, at_least=0, at_most=MAX_TOKEN_ID) for token_id in token_ids)


def _as_bias(bias: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    try:
        numbers = dict(bias)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"logit_bias must be numbers by token, found {shown(bias)}") from None
    token_ids = _as_tokens("logit_bias", numbers, at_most=MAX_BIASED_TOKENS)
    values = (as_number("logit_bias", value, at_least=-100.0, at_most=100.0) for value in numbers.values())
    return tuple(zip(token_ids, values, strict=True))
