"""What a user asks for."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from pagedkv.arrays import MAX_TOKEN_ID, as_int, keep_int, shown
from pagedkv.block_keys import ExtraKey, as_extras, check_adapter, check_salt
from pagedkv.content import MAX_TOKENS
from pagedkv.errors import InvalidArgumentError
from pagedkv.manager import Prompt

__all__ = ["FinishReason", "Request"]

MAX_SAMPLES = 1024
MAX_STOP_TOKENS = 1024
MAX_ID_BYTES = 2**20
MAX_CLIENT_CHARACTERS = 4096
MAX_CLIENT_NUMBER = 2**64


class FinishReason(StrEnum):
    """Why a request ended."""

    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt and what to make of it.

    `prompt` is token ids, or a SimulatedPrompt. `max_new_tokens` may be 0: then the prompt is computed and nothing is
    sampled. `n` samples share the prompt's blocks. `priority` counts for policies that look at it: lower goes first.
    `reads_cache=False` computes the whole prompt (for log-probabilities of prompt tokens) but leaves its blocks to others.
    `stop_token_ids` are kept as a frozenset.
    """

    request_id: str
    prompt: Prompt = field(repr=False)
    max_new_tokens: int
    priority: float = field(default=0.0, kw_only=True)
    client: str | int | None = field(default=None, kw_only=True)
    salt: bytes = field(default=b"", kw_only=True, repr=False)
    adapter: str | None = field(default=None, kw_only=True)
    extras: tuple[ExtraKey, ...] = field(default=(), kw_only=True)
    stop_token_ids: Collection[int] = field(default=(), kw_only=True, repr=False)
    n: int = field(default=1, kw_only=True)
    reads_cache: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id or len(self.request_id) > MAX_ID_BYTES:
            raise InvalidArgumentError(f"request_id must be a str of 1 to {MAX_ID_BYTES} characters")
        keep_int(self, "max_new_tokens", at_least=0, at_most=MAX_TOKENS)
        keep_int(self, "n", at_least=1, at_most=MAX_SAMPLES)
        if (
            isinstance(self.priority, bool)
            or not isinstance(self.priority, int | float)
            or not abs(self.priority) <= sys.float_info.max
        ):
            raise InvalidArgumentError(f"priority must be a finite number, found {shown(self.priority)}")
        self._check_owner()
        self._check_stops()

    def _check_owner(self) -> None:
        """Who asks, and what keeps its blocks apart from others'."""
        client = self.client
        if isinstance(client, str):
            is_fine = len(client) <= MAX_CLIENT_CHARACTERS
        else:  # Python does not even write a number of more than 4,300 digits.
            is_fine = client is None or (isinstance(client, int) and abs(client) < MAX_CLIENT_NUMBER)
        if not is_fine:
            raise InvalidArgumentError(
                f"client must be a str of at most {MAX_CLIENT_CHARACTERS} characters, or a whole number within 64 bits"
            )
        check_salt(self.salt)
        check_adapter(self.adapter)
        object.__setattr__(self, "extras", as_extras(self.extras))
        if not isinstance(self.reads_cache, bool):
            raise InvalidArgumentError(f"reads_cache must be True or False, found {shown(self.reads_cache)}")

    def _check_stops(self) -> None:
        stops = self.stop_token_ids
        if not isinstance(stops, Collection) or isinstance(stops, str):
            raise InvalidArgumentError(f"stop_token_ids must be token ids, found {type(stops).__name__}")
        try:
            num_stops = len(stops)
        except OverflowError:  # A range may be longer than `len` can tell.
            num_stops = MAX_STOP_TOKENS + 1
        if num_stops > MAX_STOP_TOKENS:
            raise InvalidArgumentError(f"at most {MAX_STOP_TOKENS} stop tokens, found {num_stops}")
        # A set, and its own: looked at in many steps, in which the caller may change what it passed.
        checked = (as_int("stop_token_ids", token_id, at_least=0, at_most=MAX_TOKEN_ID) for token_id in stops)
        object.__setattr__(self, "stop_token_ids", frozenset(checked))
