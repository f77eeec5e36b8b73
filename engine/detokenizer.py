"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

__all__ = ["Detokenizer", "Tokenizer"]

REPLACEMENT = "\ufffd"
MAX_CHARACTER_BYTES = 4  # Of UTF-8: so at most four tokens stand between two ends of characters.
NUM_CONTEXT_TOKENS = 8
MAX_WINDOW_TOKENS = 16


class AddedToken(Protocol):
    """A token beside the trained ones."""

    special: bool


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens with a role of their own."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Tokens beside the trained ones, special or not."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Text of the tokens."""


class Detokenizer:
    """Turns a growing row of tokens into text, piece by piece; a piece is final and never ends within a character.

    Tokens are decoded in the context of the prompt's last ones, since the first word of a text loses its space in many
    tokenizers: the pieces together are what `decode(prompt + output)` has beyond `decode(prompt)`. That holds for
    tokenizers whose text only grows with further tokens. (One that falls back to single bytes decodes a broken
    character differently from case to case.) Spaces are left as they are (`clean_up_tokenization_spaces=False`), since
    cleaning them up changes text that was passed on.

    A token costs one `decode` of at most some 16 tokens, however long the text.
    """

    __slots__ = ("_new", "_num_emitted", "_num_settled", "_options", "_skipped", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        """`prompt_token_ids` may be any part of the prompt that holds its end. O(1)."""
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._skipped = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._new: list[str] = []
        """Text that has become final since the last piece."""
        self._window = self._context(prompt_token_ids)
        # Tokens of the window, from its start, that ended a character; and characters of its text that were passed on.
        # A character that the prompt leaves unfinished is passed on whole.
        self._num_settled = len(self._window)
        self._num_emitted = len(self._decode(self._window).rstrip(REPLACEMENT))

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens, and return the text that has become final through them."""
        tokens = [int(token_id) for token_id in token_ids if token_id not in self._skipped]
        for token_id in tokens[self._take_many(tokens) :]:
            self._window.append(token_id)
            self._settle()
        return self._take_piece()

    def finish(self) -> str:
        """Return what was held back: the output ends here, perhaps within a character."""
        self._emit(self._decode(self._window), num_held=0)
        return self._take_piece()

    def _take_piece(self) -> str:
        piece = "".join(self._new)
        self._new.clear()
        return piece

    def _take_many(self, tokens: list[int]) -> int:
        """Take as many of several tokens as end with a whole character, at one go; returns how many, or 0."""
        for num_tokens in range(len(tokens), max(len(tokens) - MAX_CHARACTER_BYTES, 1), -1):
            window = self._window + tokens[:num_tokens]
            text = self._decode(window)
            if not text.endswith(REPLACEMENT):
                self._window = window
                self._settle_all(text)
                return num_tokens
        return 0

    def _settle(self) -> None:
        """Emit what the newest token made final."""
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            self._settle_all(text)
        elif len(self._window) - self._num_settled > MAX_CHARACTER_BYTES:
            # No character is that long: these bytes are none, and only the last of them can still begin one.
            self._emit(text, num_held=1)
            if len(self._window) > MAX_WINDOW_TOKENS:
                self._rebase(len(self._window) - MAX_CHARACTER_BYTES - 1, num_held=1)
                self._num_settled = 0

    def _settle_all(self, text: str) -> None:
        """Emit the whole text of the window, and let go of tokens that no longer matter."""
        self._emit(text, num_held=0)
        if len(self._window) > MAX_WINDOW_TOKENS:
            self._rebase(self._num_settled, num_held=0)
        self._num_settled = len(self._window)

    def _emit(self, text: str, *, num_held: int) -> None:
        end = len(text) - num_held
        self._new.append(text[self._num_emitted : end])
        self._num_emitted = end

    def _rebase(self, start: int, *, num_held: int) -> None:
        """Let the window begin at its token `start`, unless the tokens from there have no text to go on from."""
        window = self._window[start:]
        text = self._decode(window)
        if text:
            self._window = window
            self._num_emitted = len(text) - num_held

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens that have a text, begun between two characters if that can be had."""
        tail = [int(token_id) for token_id in prompt_token_ids[-4 * NUM_CONTEXT_TOKENS :]]
        tail = [token_id for token_id in tail if token_id not in self._skipped][-NUM_CONTEXT_TOKENS:]
        for start in range(min(MAX_CHARACTER_BYTES, len(tail))):
            if not self._decode(tail[start:]).startswith(REPLACEMENT):
                return tail[start:]
        return tail

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options)


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that `skip_special_tokens` skips. Left out beforehand: a long run would be decoded again and again."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}
