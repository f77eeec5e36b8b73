"""Hands what the engine thread has made to one caller of an event loop, which may read as slowly as it likes."""

from __future__ import annotations

import asyncio
from array import array
from io import StringIO
from threading import Lock

from pagedkv.engine.outputs import Piece, RequestOutput
from pagedkv.engine.sampling.logprobs import TokenLogprobs

__all__ = ["Mailbox"]


class Mailbox:
    """What one caller has not read yet: at most one piece for each sample, and the end of its request.

    Pieces that wait are merged, so a caller that never reads holds its tokens' numbers and text, and no objects of a
    step. The engine thread never waits for a reader.
    """

    __slots__ = ("_arrived", "_end", "_is_announced", "_lock", "_loop", "_unread")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = Lock()
        self._arrived = asyncio.Event()
        self._is_announced = False
        """Whether the loop was told already of what is unread: one call into it, however many pieces come meanwhile."""
        self._unread: dict[int, _Unread] = {}
        self._end: RequestOutput | Exception | None = None

    def put(self, piece: Piece) -> bool:
        """Add a piece; from any thread. Returns False if the loop was closed, so that nobody will ever read."""
        with self._lock:
            unread = self._unread.get(piece.index)
            if unread is None:
                unread = self._unread[piece.index] = _Unread()
            unread.add(piece)
        return self._announce()

    def end(self, end: RequestOutput | Exception) -> None:
        """The request has ended, or could not be carried out; from any thread. The first end counts."""
        with self._lock:
            if self._end is None:
                self._end = end
        self._announce()

    async def take(self) -> tuple[list[Piece], RequestOutput | Exception | None]:
        """Wait for news; returns what is unread, one piece for each sample, and the end if that was reached."""
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            self._is_announced = False
            unread, self._unread = self._unread, {}
            return [each.piece() for each in unread.values()], self._end

    def _announce(self) -> bool:
        with self._lock:
            if self._is_announced:
                return not self._loop.is_closed()
            self._is_announced = True
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # The loop was closed.
            return False
        return True


class _Unread:
    """The merged pieces of one sample."""

    __slots__ = ("_last", "_logprobs", "_text", "_token_ids")

    def __init__(self) -> None:
        self._last: Piece | None = None
        self._token_ids = array("i")
        self._text = StringIO()
        self._logprobs: list[TokenLogprobs] = []

    def add(self, piece: Piece) -> None:
        self._last = piece
        self._token_ids.extend(piece.token_ids)
        self._text.write(piece.text)
        self._logprobs.extend(piece.logprobs or ())

    def piece(self) -> Piece:
        last = self._last
        if last is None:
            raise RuntimeError("nothing was added")
        return Piece(
            last.request_id,
            last.index,
            tuple(self._token_ids),
            self._text.getvalue(),
            last.finish_reason,
            last.stop,
            None if last.logprobs is None else tuple(self._logprobs),
        )
