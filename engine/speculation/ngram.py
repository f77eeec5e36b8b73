"""Prompt look-up: what followed when the last few tokens stood in the text before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32s, as_int, as_token_ids
from pagedkv.engine.speculation.drafter import NO_DRAFTS, SampleKey, checked_limits
from pagedkv.errors import ConfigError, InvalidArgumentError, UnknownIdError

__all__ = ["NgramDrafter"]

MAX_DRAFTS = 64
MAX_NGRAM = 64
MAX_LOOKBACK = 2**26
TOKEN_BYTES = 4


class NgramDrafter:
    """Guesses that a text repeats itself: takes its last n tokens, finds where they stood last, proposes what followed there.

    The longest n that is found counts, from `max_ngram` down to `min_ngram`. No model, no training: for answers that quote
    their prompt, such as summaries, edits of code, or extraction. This is prompt look-up decoding (A. Saxena, 2023,
    github.com/apoorvumang/prompt-lookup-decoding), as PromptLookupCandidateGenerator of transformers does it, but for two
    things: that takes the first place found, this the latest, since a text resembles most what it said last; and where the
    text ends before enough tokens have followed, it goes on as if it repeated itself with the period found.

    Each sample has an index from n-gram to latest place. A new token costs O(1) for each n; beginning costs O(n) for each
    token. About 120 bytes for each n and token, of the last `lookback` tokens alone: K/V of a token takes thousands.

    >>> drafter = NgramDrafter(num_drafts=3)
    >>> drafter.begin(("a", 0), [1, 2, 3, 4, 9, 2, 3])
    >>> drafter.propose([("a", 0)], [8])[0].tolist()
    [4, 9, 2]
    """

    def __init__(self, num_drafts: int = 4, *, max_ngram: int = 3, min_ngram: int = 2, lookback: int = 2**16) -> None:
        """Guess `num_drafts` tokens at most, by what followed n-grams within the last `lookback` tokens. Raises ConfigError.

        `min_ngram=1` guesses far more often, and is seldom right: a single token says little about the next.
        """
        try:
            self.num_drafts = as_int("num_drafts", num_drafts, at_least=1, at_most=MAX_DRAFTS)
            self.max_ngram = as_int("max_ngram", max_ngram, at_least=1, at_most=MAX_NGRAM)
            self.min_ngram = as_int("min_ngram", min_ngram, at_least=1, at_most=self.max_ngram)
            self.lookback = as_int("lookback", lookback, at_least=1, at_most=MAX_LOOKBACK)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        self._texts: dict[SampleKey, _IndexedText] = {}

    def check_target(self, vocab_size: int) -> None:
        """Any model will do: its own tokens are repeated."""

    def begin(self, key: SampleKey, token_ids: Sequence[int] | Int32s, *, salt: bytes = b"") -> None:  # noqa: ARG002
        """See Drafter. Samples share nothing, salt or not. O(tokens)."""
        tokens = as_token_ids("token_ids", token_ids)
        if not len(tokens):
            raise InvalidArgumentError("a sample has at least one token, found none")
        text = _IndexedText(range(self.max_ngram, self.min_ngram - 1, -1), self.lookback)
        text.extend(tokens)
        self._texts[key] = text

    def extend(self, key: SampleKey, token_ids: Sequence[int] | Int32s) -> None:
        """See Drafter. O(tokens)."""
        self._text(key).extend(as_token_ids("token_ids", token_ids))

    def end(self, key: SampleKey) -> None:
        """See Drafter. O(1)."""
        self._texts.pop(key, None)

    def propose(self, keys: Sequence[SampleKey], max_drafts: Sequence[int]) -> list[Int32s]:
        """See Drafter. O(1) for each key and n."""
        limits = checked_limits(keys, max_drafts, self.num_drafts)
        texts = [self._text(key) for key in keys]
        return [text.continuation(limit) if limit else NO_DRAFTS for text, limit in zip(texts, limits, strict=True)]

    def _text(self, key: SampleKey) -> _IndexedText:
        try:
            return self._texts[key]
        except KeyError:
            raise UnknownIdError(f"no sample {key!r} was begun") from None


class _IndexedText:
    """Tokens, and for each n where an n-gram was followed last.

    An n-gram is entered when the token behind it comes, so that looking up the end of the text finds an earlier place.
    Places that fall behind the last `lookback` tokens are dropped one by one as new ones come.
    """

    __slots__ = ("_data", "_indices", "_lookback")

    def __init__(self, sizes: range, lookback: int) -> None:
        self._data = bytearray()
        # The bytes of an n-gram are its key: exact, and hashed faster than a tuple of numbers.
        self._indices: list[tuple[int, dict[bytes, int]]] = [(size * TOKEN_BYTES, {}) for size in sizes]
        self._lookback = lookback * TOKEN_BYTES

    def extend(self, token_ids: Int32s) -> None:
        """Append tokens. O(tokens) for each n."""
        data, lookback = self._data, self._lookback
        start = len(data)
        data += token_ids.astype("<i4").tobytes()
        for width, index in self._indices:
            first = max(start, width, len(data) - lookback)
            tail = bytes(data[first - width :]) if first < len(data) else b""
            for place in range(first, len(data), TOKEN_BYTES):
                index[tail[place - first : place - first + width]] = place
            # What was entered for a text that ended at `start` began where that text's lookback did.
            for place in range(max(width, start - lookback), min(start, len(data) - lookback), TOKEN_BYTES):
                gram = bytes(data[place - width : place])
                if index.get(gram) == place:
                    del index[gram]

    def continuation(self, num_tokens: int) -> Int32s:
        """What followed the end of the text when it stood there before, (num_tokens,) int32, or nothing. O(1) for each n."""
        data = self._data
        end = len(data)
        for width, index in self._indices:
            place = index.get(bytes(data[end - width :])) if width < end else None
            if place is not None:
                followed = np.frombuffer(bytes(data[place : place + num_tokens * TOKEN_BYTES]), "<i4")
                return np.resize(followed, num_tokens)  # Repeats itself where the text ends.
        return NO_DRAFTS
