"""What no request may exceed, however empty the queue: told before anything is queued."""

from __future__ import annotations

from pagedkv.arrays import Int32s, shown
from pagedkv.engine.errors import ContextLengthError
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import FCFS, Request, RequestTooLargeError, Scheduler
from pagedkv.scheduler.client_shares import ClientShares
from pagedkv.scheduler.refusal import reason_to_refuse

__all__ = ["RequestLimits"]


class RequestLimits:
    """The limits of a model, its tokenizer and a scheduler. All checks raise InvalidArgumentError, and are O(prompt)."""

    __slots__ = ("_has_tokenizer", "_max_length", "_scheduler", "_shares", "_vocab_size")

    def __init__(self, scheduler: Scheduler, *, vocab_size: int, max_length: int | None, has_tokenizer: bool) -> None:
        cache = scheduler.manager.config
        self._scheduler = scheduler
        self._shares = ClientShares(scheduler.config, num_blocks=cache.num_blocks, block_size=cache.block_size)
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._has_tokenizer = has_tokenizer

    def check_params(self, params: SamplingParams) -> None:
        """Whether this model and its tokenizer can do what is asked for."""
        if params.stop and not self._has_tokenizer:
            raise InvalidArgumentError("stop strings need a tokenizer: give LLM one, or use stop_token_ids")
        if params.logprobs is not None and params.logprobs > self._vocab_size:
            raise InvalidArgumentError(
                f"logprobs {params.logprobs} exceeds the vocabulary of {self._vocab_size} tokens"
            )
        named = (*(params.allowed_token_ids or ()), *dict(params.logit_bias))
        if named and max(named) >= self._vocab_size:
            raise InvalidArgumentError(
                f"the model has tokens 0..{self._vocab_size - 1}, logit_bias or allowed_token_ids hold {max(named)}"
            )

    def check_priority(self, priority: float) -> None:
        """Whether anybody looks at it. A policy that is not ours may."""
        if priority and isinstance(self._scheduler.policy, FCFS):
            raise InvalidArgumentError(
                f"priority {shown(priority)} would do nothing: give LLM a policy that looks at it, such as Priority()"
            )

    def check_prompt(self, token_ids: Int32s, params: SamplingParams) -> None:
        """Whether the model has these tokens, (n,) int32, and positions for them and the new ones.

        Raises ContextLengthError, which is an InvalidArgumentError, for too many.
        """
        if not len(token_ids):
            raise InvalidArgumentError("a prompt has at least one token, found none")
        if int(token_ids.max()) >= self._vocab_size:
            raise InvalidArgumentError(
                f"the model has tokens 0..{self._vocab_size - 1}, the prompt holds {token_ids.max()}"
            )
        if self._max_length is not None and len(token_ids) + params.max_tokens > self._max_length:
            asked = f" and max_tokens={params.max_tokens} exceed" if params.max_tokens else " exceeds"
            raise ContextLengthError(
                f"a prompt of {len(token_ids)} tokens{asked} the model's {self._max_length} positions"
            )

    def check_size(self, token_ids: Int32s, params: SamplingParams) -> None:
        """Whether the request could ever run. Raises RequestTooLargeError with the arithmetic, as `Scheduler.add` does."""
        reason = reason_to_refuse(
            Request("checked", token_ids, params.max_tokens, n=params.n),
            len(token_ids),
            self._scheduler.config,
            num_blocks=self._scheduler.manager.config.num_blocks,
            block_size=self._scheduler.manager.config.block_size,
            shares=self._shares,
        )
        if reason:
            raise RequestTooLargeError(f"the request can never run: {reason}")
