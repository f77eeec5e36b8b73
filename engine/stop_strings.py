"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.errors import InvalidArgumentError

__all__ = ["StopStrings"]


class StopStrings:
    """Passes a text on, up to the first stop string; never lets through what may be the beginning of one.

    The stop string that is complete first wins, and of those complete at the same character the longest: so where the
    text is cut does not depend on the pieces in which it came. With `keep`, the stop string itself is passed on as
    well, and nothing has to be held back.

    Each character costs O(stops) amortised (Knuth, Morris and Pratt 1977: one automaton per stop string), however long
    they are.

    >>> stops = StopStrings(("END",))
    >>> stops.push("the E"), stops.push("gg E"), stops.push("ND of it")
    (('the ', None), ('Egg ', None), ('', 'END'))
    """

    __slots__ = ("_fallbacks", "_held", "_keep", "_lengths", "_stops", "stopped")

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        """Raises InvalidArgumentError for an empty stop string, or one str in place of several."""
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidArgumentError(f"stops must be several non-empty str, found {stops!r}")
        # Longest first: of two that are complete at the same character, the first one found wins.
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # Of the beginning of each stop string that the text so far ends in.
        self._keep = keep
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece; return the text that may be passed on, and the stop string once there was one.

        After a stop, every further text is dropped. O(characters · stops).
        """
        if self.stopped is not None:
            return "", self.stopped
        known = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self.stopped = stop
                return self._cut_at(known, end, stop), stop
        return self._release(known), None

    def skip(self, text: str) -> str:
        """Take the next piece, in which a stop string may begin but none counts; return the text that may be passed on."""
        for character in text:
            self._advance(character)
        return self._release(self._held + text)

    def finish(self) -> str:
        """Return what was held back: the text ends here, so no stop string will come of it."""
        text, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return text

    def _advance(self, character: str) -> str | None:
        """Move every automaton one character on. Return the longest stop string that is complete."""
        complete = None
        for i, stop in enumerate(self._stops):
            length, fallbacks = self._lengths[i], self._fallbacks[i]
            while length and stop[length] != character:
                length = fallbacks[length - 1]
            length += stop[length] == character
            if length == len(stop):
                complete = complete or stop
                length = fallbacks[length - 1]  # It may be told to go on.
            self._lengths[i] = length
        return complete

    def _cut_at(self, known: str, end: int, stop: str) -> str:
        if self._keep:
            return known[len(self._held) : end]
        self._held = ""
        return known[: end - len(stop)]

    def _release(self, known: str) -> str:
        if self._keep:
            return known
        num_final = len(known) - max(self._lengths, default=0)
        self._held = known[num_final:]
        return known[:num_final]


def _fallbacks(stop: str) -> list[int]:
    """Return, for each beginning of `stop`, the length of the longest shorter beginning that it ends in."""
    fallbacks = [0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = fallbacks[length - 1]
        length += stop[length] == character
        fallbacks.append(length)
    return fallbacks
