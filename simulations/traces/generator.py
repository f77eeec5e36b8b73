"""Synthetic traces: Gamma arrivals, log-normal lengths, shared system prompts and clients of unequal weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.trace import Trace

__all__ = ["LengthDistribution", "SharedPrefixes", "generate_trace"]


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Log-normal lengths in tokens: `median * exp(sigma * N(0, 1))`, rounded, then moved into 1 to `maximum`.

    The mean is about `median * exp(sigma**2 / 2)`. Raises InvalidArgumentError for parameters out of range.
    """

    median: float
    sigma: float
    maximum: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.median) and 1 <= self.median <= limits.MAX_TOKENS):
            raise InvalidArgumentError(f"median: expected 1 to {limits.MAX_TOKENS} tokens, found {self.median}")
        if not 0 <= self.sigma <= 10:
            raise InvalidArgumentError(f"sigma: expected 0 to 10, found {self.sigma}")
        if not 1 <= self.maximum <= limits.MAX_TOKENS:
            raise InvalidArgumentError(f"maximum: expected 1 to {limits.MAX_TOKENS} tokens, found {self.maximum}")

    def sample(self, num_requests: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw (num_requests,) int64 lengths."""
        lengths = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(num_requests)))
        return np.clip(lengths, 1, self.maximum).astype(np.int64)


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """System prompts: a `share` of the requests begins with one of `num_prefixes`, all `num_tokens` long, as likely.

    `block_size` is the number of tokens that a content id names. Raises InvalidArgumentError for parameters out of
    range.
    """

    num_prefixes: int
    num_tokens: int
    share: float = 1.0
    block_size: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.num_prefixes <= limits.MAX_REQUESTS:
            raise InvalidArgumentError(f"num_prefixes: expected 1 to {limits.MAX_REQUESTS}, found {self.num_prefixes}")
        if not 1 <= self.num_tokens < limits.MAX_TOKENS:
            raise InvalidArgumentError(f"num_tokens: expected 1 to {limits.MAX_TOKENS - 1}, found {self.num_tokens}")
        if not 0 <= self.share <= 1:
            raise InvalidArgumentError(f"share: expected 0 to 1, found {self.share}")
        if not 1 <= self.block_size <= limits.MAX_CONTENT_BLOCK_SIZE:
            expected = f"1 to {limits.MAX_CONTENT_BLOCK_SIZE}"
            raise InvalidArgumentError(f"block_size: expected {expected}, found {self.block_size}")


def generate_trace(
    num_requests: int,
    *,
    rng: np.random.Generator,
    rate: float = 1.0,
    burstiness: float = 1.0,
    prompt: LengthDistribution = LengthDistribution(512, 1.0, 8192),
    output: LengthDistribution = LengthDistribution(128, 0.8, 2048),
    prefixes: SharedPrefixes | None = None,
    num_clients: int | None = None,
    name: str = "generated",
) -> Trace:
    """Draw a trace; the same arguments and generator state give the same trace.

    rate:        requests per second, on average
    burstiness:  coefficient of variation of the Gamma gaps: 1 is Poisson, 0 a metronome, above 1 comes in bursts
    prompt:      lengths of prompts; with `prefixes`, of the part that follows the shared prefix
    prefixes:    without them the trace has no content ids
    num_clients: client `k` has weight `1 / (k + 1)`; None for a trace without clients

    The first request arrives at 0; arrivals are rounded to microseconds, so that they are the same on every machine.
    Raises InvalidArgumentError for parameters out of range. O(num_requests).
    """
    if not 1 <= num_requests <= limits.MAX_REQUESTS:
        raise InvalidArgumentError(f"num_requests: expected 1 to {limits.MAX_REQUESTS}, found {num_requests}")
    if num_clients is not None and not 1 <= num_clients <= limits.MAX_REQUESTS:
        raise InvalidArgumentError(f"num_clients: expected 1 to {limits.MAX_REQUESTS}, found {num_clients}")
    arrival_s = _sample_arrivals(num_requests, rate, burstiness, rng)
    own_tokens = prompt.sample(num_requests, rng)
    output_tokens = output.sample(num_requests, rng)
    prompt_tokens, runs = own_tokens, None
    if prefixes is not None:
        prompt_tokens, runs = _share_prefixes(own_tokens, prefixes, rng)
    clients = None
    if num_clients is not None:
        weights = 1.0 / np.arange(1, num_clients + 1)
        clients = rng.choice(num_clients, size=num_requests, p=weights / weights.sum())
    return Trace.from_columns(
        arrival_s,
        prompt_tokens,
        output_tokens,
        clients=clients,
        content_block_size=None if prefixes is None else prefixes.block_size,
        content_runs=runs,
        name=name,
    )


def _sample_arrivals(
    num_requests: int, rate: float, burstiness: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidArgumentError(f"rate: expected requests per second above 0, found {rate}")
    if not (burstiness == 0 or 0.001 <= burstiness <= 100):
        raise InvalidArgumentError(f"burstiness: expected 0, or 0.001 to 100, found {burstiness}")
    if num_requests / rate > limits.MAX_ARRIVAL_S:
        raise InvalidArgumentError(f"rate: {rate} requests/s stretch the trace beyond {limits.MAX_ARRIVAL_S:g} s")
    # A Gamma law of shape 1 / cv² and scale cv² / rate has mean 1 / rate and coefficient of variation cv.
    gaps = np.full(num_requests - 1, 1.0)
    if burstiness > 0:
        gaps = rng.gamma(1 / burstiness**2, burstiness**2, size=num_requests - 1)
    return np.round(np.concatenate([[0.0], np.cumsum(gaps)]) / rate, 6)


def _share_prefixes(
    own_tokens: npt.NDArray[np.int64], prefixes: SharedPrefixes, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], list[list[tuple[int, int]]]]:
    """Put shared prefixes before some prompts; return the new lengths and the runs of content ids."""
    num_requests = len(own_tokens)
    has_prefix = rng.random(num_requests) < prefixes.share
    choice = rng.integers(prefixes.num_prefixes, size=num_requests)
    prompt_tokens = own_tokens + np.where(has_prefix, prefixes.num_tokens, 0)
    if int(prompt_tokens.max()) > limits.MAX_TOKENS:
        raise InvalidArgumentError(
            f"prefixes: prompts of {prompt_tokens.max()} tokens, at most {limits.MAX_TOKENS} can be"
        )
    # The block in which prefix and own part meet is the request's own.
    num_shared = prefixes.num_tokens // prefixes.block_size
    next_id = num_shared * prefixes.num_prefixes
    runs = []
    for is_shared, prefix, tokens in zip(has_prefix.tolist(), choice.tolist(), prompt_tokens.tolist(), strict=True):
        shared = [(prefix * num_shared, num_shared)] if is_shared and num_shared else []
        num_own = -(-tokens // prefixes.block_size) - sum(count for _, count in shared)
        own = [(next_id, num_own)] if num_own else []
        next_id += num_own
        runs.append(shared + own)
    return prompt_tokens, runs
