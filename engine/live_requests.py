"""Requests under way: what each of their samples has produced, and who is to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pagedkv.arrays import Int32s
from pagedkv.engine.detokenizer import Detokenizer
from pagedkv.engine.outputs import Completion, Piece, RequestOutput, RequestTimings
from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.stop_strings import StopStrings

__all__ = ["LiveRequest", "LiveSample", "OnFinish", "OnPiece"]

NUM_CONTEXT_TOKENS = 64
"""Of the prompt's end, for the detokenizer."""
OnPiece = Callable[[Piece], None]
OnFinish = Callable[[RequestOutput], None]


class LiveSample:
    """One sample of a live request. Touched in every step only if `listens`; otherwise its tokens are read at its end.

    What the tokenizer raises is kept as `error`, for its request to be ended with; the sample has no text then.
    """

    __slots__ = (
        "_detokenizer",
        "_end_token_ids",
        "_new_logprobs",
        "_new_text",
        "_new_tokens",
        "_stop_strings",
        "_text",
        "_tokenizer",
        "error",
        "first_token_s",
        "has_finished",
        "index",
        "logprobs",
        "num_preemptions",
        "num_tokens",
        "params",
        "request",
        "row",
        "stop",
    )

    def __init__(self, request: LiveRequest, index: int, tokenizer: Any, end_token_ids: frozenset[int]) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.params = params
        self.row: int | None = None
        """The row that it was given last."""
        self.num_preemptions = 0
        self.num_tokens = 0
        """Tokens that it was told of; for one that does not listen, 0 until it ends."""
        self.first_token_s: float | None = None
        self.has_finished = False
        self.stop: str | int | None = None
        self.logprobs: list[TokenLogprobs] | None = [] if params.logprobs is not None else None
        self.error: Exception | None = None
        self._end_token_ids = end_token_ids
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        self._stop_strings = StopStrings(tuple(params.stop), keep=params.include_stop_in_text) if params.stop else None
        self._text: list[str] = []
        self._new_tokens: list[int] = []
        self._new_text: list[str] = []
        self._new_logprobs: list[TokenLogprobs] = []

    @property
    def listens(self) -> bool:
        """Whether its tokens must be looked at as they come: somebody streams, text can stop it, or logprobs are kept."""
        return self.request.on_piece is not None or self._stop_strings is not None or self.logprobs is not None

    def push(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Take one new token; returns whether a stop string ended the sample with it."""
        self.num_tokens += 1
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(logprobs)
            self._new_logprobs.append(logprobs)
        self._new_tokens.append(token_id)
        is_end = token_id in self._end_token_ids and self.num_tokens > self.params.min_tokens
        if is_end:
            self.stop = token_id
            return False
        return self._take_text(self._decode((token_id,)))

    def _take_all(self, token_ids: tuple[int, ...]) -> None:
        """Take all tokens of one that did not listen, whose text is then decoded at one go."""
        self.num_tokens = len(token_ids)
        if token_ids and token_ids[-1] in self._end_token_ids and self.num_tokens > self.params.min_tokens:
            self.stop = token_ids[-1]
            token_ids = token_ids[:-1]
        self._add_text(self._decode(token_ids))

    def _decode(self, token_ids: Iterable[int] | None) -> str:
        """Text that becomes final with these tokens, or, for None, because there are no more."""
        if self._tokenizer is None:
            return ""
        try:
            if self._detokenizer is None:
                context = self.request.prompt_token_ids[-NUM_CONTEXT_TOKENS:].tolist()
                skip = self.params.skip_special_tokens
                self._detokenizer = Detokenizer(self._tokenizer, context, skip_special_tokens=skip)
            return self._detokenizer.finish() if token_ids is None else self._detokenizer.push(token_ids)
        except Exception as error:  # noqa: BLE001 - a tokenizer may raise anything; it must not take other requests along
            self._tokenizer, self.error = None, error
            return ""

    def _take_text(self, text: str) -> bool:
        """Add text that became final; returns whether it completes a stop string, which counts only from `min_tokens` on."""
        stop = None
        if self._stop_strings is not None and self.num_tokens < self.params.min_tokens:
            text = self._stop_strings.skip(text)
        elif self._stop_strings is not None:
            text, stop = self._stop_strings.push(text)
        self._add_text(text)
        if stop is not None:
            self.stop = stop
        return stop is not None

    def _add_text(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._new_text.append(text)

    def take_piece(self) -> Piece:
        """What was pushed since the last piece."""
        piece = Piece(
            self.request.request_id,
            self.index,
            tuple(self._new_tokens),
            "".join(self._new_text),
            logprobs=tuple(self._new_logprobs) if self.logprobs is not None else None,
        )
        self._new_tokens.clear()
        self._new_text.clear()
        self._new_logprobs.clear()
        return piece

    def finish(self, token_ids: Int32s, reason: str) -> Completion:
        """It has ended with these tokens; releases text that was held back. O(tokens) if nothing was pushed before."""
        self.has_finished = True
        tokens = tuple(token_ids.tolist())
        if not self.listens:
            self._take_all(tokens)
        if not isinstance(self.stop, str):
            if self._take_text(self._decode(None)) and reason == "length":
                reason = "stop"
            if self._stop_strings is not None:
                self._add_text(self._stop_strings.finish())
        return Completion(
            self.index,
            tokens,
            None if self._tokenizer is None else "".join(self._text),
            reason if self.error is None else "error",
            stop=self.stop if reason == "stop" else None,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class LiveRequest:
    """A request from `add` to its end.

    on_piece:  called for every sample that got tokens in a step, or None
    on_finish: called once, when the last sample has ended
    """

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "completions",
        "error",
        "num_cached_tokens",
        "on_finish",
        "on_piece",
        "params",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "salt",
        "samples",
        "seed",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Int32s,
        params: SamplingParams,
        *,
        seed: int,
        arrival_s: float,
        prompt: str | None,
        salt: bytes,
        on_piece: OnPiece | None,
        on_finish: OnFinish,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.salt = salt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.arrival_s = arrival_s
        self.on_piece = on_piece
        self.on_finish = on_finish
        self.admitted_s: float | None = None
        self.num_cached_tokens = 0
        self.samples: dict[int, LiveSample] = {}
        self.completions: dict[int, Completion] = {}
        self.error: Exception | None = None

    @property
    def num_samples(self) -> int:
        """Samples that will end: one, if only the prompt is computed, for then nothing forks."""
        return self.params.n if self.params.max_tokens else 1

    def output(self, now: float) -> RequestOutput:
        """The whole output, when its last sample has ended."""
        first_tokens = [sample.first_token_s for sample in self.samples.values() if sample.first_token_s is not None]
        return RequestOutput(
            self.request_id,
            self.prompt,
            tuple(self.prompt_token_ids.tolist()),
            tuple(self.completions[index] for index in sorted(self.completions)),
            RequestTimings(
                self.arrival_s,
                self.admitted_s,
                min(first_tokens, default=None),
                now,
                self.num_cached_tokens,
                sum(sample.num_preemptions for sample in self.samples.values()),
            ),
            self.error,
        )
