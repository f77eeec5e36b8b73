"""What a caller gets back: whole outputs, and pieces of them as they come."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.engine.sampling.logprobs import TokenLogprobs

__all__ = ["BeamOutput", "Completion", "Piece", "RequestOutput", "RequestTimings"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the `n` samples of a request.

    token_ids:     new tokens, the one that ended it included
    text:          unless asked for, without special tokens and the stop string; never with the token that ended it; None
                   without a tokenizer
    finish_reason: "stop", "length", "abort" or "error"
    stop:          the stop string or token id that ended it, else None
    logprobs:      one entry per token, if asked for
    """

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """When things happened to a request, in seconds of the engine's clock; None for what never did.

    num_cached_tokens: prompt tokens that the prefix cache had when the request was first admitted
    num_preemptions:   how often one of its samples lost its seat
    """

    arrival_s: float
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float
    num_cached_tokens: int
    num_preemptions: int

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from arrival until it was sampled and brought to the host."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def queue_s(self) -> float | None:
        """From arrival until it was first admitted."""
        return None if self.admitted_s is None else self.admitted_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """From arrival until the last of its samples ended."""
        return self.finished_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request that has ended, with its samples in order; `error` says what ended it where it did not end by itself."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    timings: RequestTimings
    error: Exception | None = None

    @property
    def text(self) -> str | None:
        """Text of the first sample."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """New tokens of the first sample."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first sample ended."""
        return self.completions[0].finish_reason


@dataclass(frozen=True, slots=True)
class Piece:
    """What one or several steps added to a sample: new tokens, and the text that they made final, which may be none yet.

    The last piece of a sample has its `finish_reason`; the texts of all pieces make up the completion's.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class BeamOutput:
    """One text that beam search found; `score` is its log-probability / its new tokens ** length_penalty."""

    token_ids: tuple[int, ...]
    text: str | None
    score: float
