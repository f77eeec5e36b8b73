"""The thread that an engine runs in, and what it and its callers hand each other."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Condition, Thread
from typing import Any

from pagedkv.arrays import Int32s
from pagedkv.engine.core import Engine
from pagedkv.engine.errors import EngineClosedError
from pagedkv.engine.llm import LLM
from pagedkv.engine.mailbox import Mailbox
from pagedkv.engine.outputs import Piece, RequestOutput
from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["EngineThread"]

Command = Callable[[Engine], None]
"""What the engine thread is to do between two steps."""
EXIT_PATIENCE_S = 30.0
"""How long the interpreter's exit waits for the step under way."""


class EngineThread(Thread):
    """Runs an LLM's steps, and sleeps while there is nothing to do; `submit`, `abandon`, `stop` are for any thread.

    It does not know the AsyncLLM that started it, so that one which nobody holds any more can be told from one in use.
    """

    def __init__(self, llm: LLM) -> None:
        """Take the LLM over. Raises EngineClosedError if it was closed, or another thread has it."""
        super().__init__(name="pagedkv-engine", daemon=True)
        llm.engine.take_over(self)
        self._llm: LLM | None = llm
        """None once it was closed: who still holds this holds no K/V memory."""
        self._wake = Condition()
        """Its lock guards what follows."""
        self._commands: deque[Command] = deque()
        self._waiting: dict[str, Mailbox] = {}
        self.is_closed = False
        self._cause: BaseException | None = None
        """What it died of."""
        self._close_error: Exception | None = None
        self._numbers = itertools.count(1)
        atexit.register(self.stop, EXIT_PATIENCE_S)

    # From the callers' threads

    def open_llm(self) -> LLM:
        """The LLM, to read. Raises EngineClosedError."""
        llm = self._llm
        if self.is_closed or llm is None:
            raise self._closed_error()
        return llm

    def submit(self, token_ids: Int32s, params: SamplingParams, *, streams: bool, **asked: Any) -> tuple[str, Mailbox]:
        """Have a request added before the next step, for a caller of the running event loop. Raises EngineClosedError.

        `asked` is for `Engine.add`. What that raises is put into the mailbox.
        """
        mailbox = Mailbox(asyncio.get_running_loop())
        request_id = f"async-{next(self._numbers)}"

        def add(engine: Engine) -> None:
            on_piece = partial(self._pass_on, request_id, mailbox) if streams else None
            try:
                engine.add(request_id, token_ids, params, on_piece=on_piece, on_finish=self._finish, **asked)
            except Exception as error:  # noqa: BLE001 - what one caller's arguments raise is that caller's, whatever it is
                self._end(request_id, error)

        with self._wake:
            self.open_llm()
            self._waiting[request_id] = mailbox
            self._commands.append(add)
            self._wake.notify()
        return request_id, mailbox

    def abandon(self, request_id: str) -> None:
        """Nobody waits for this request any more: have it aborted before the next step."""

        def abort(engine: Engine) -> None:
            if engine.is_live(request_id):
                engine.abort(request_id)

        with self._wake:
            self._waiting.pop(request_id, None)
            if not self.is_closed:
                self._commands.append(abort)
                self._wake.notify()

    def stop(self, patience_s: float | None = None) -> None:
        """Abort what is under way, close the LLM, and wait for that."""
        self._close()
        self.join(patience_s)
        atexit.unregister(self.stop)

    def forsake(self) -> None:
        """Nobody is left who could call or close: end, without anybody waiting for it."""
        if not self.is_closed:
            self._close()
            warnings.warn("an AsyncLLM was dropped without `close`", ResourceWarning, stacklevel=2)

    def raise_close_error(self) -> None:
        """Raise what closing the LLM raised, once."""
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error

    def _close(self) -> None:
        with self._wake:
            self.is_closed = True
            self._wake.notify()

    def _closed_error(self) -> EngineClosedError:
        """A new one for each who gets it: a raised exception keeps the frames it went through."""
        if self._cause is None:
            return EngineClosedError("the engine was closed")
        error = EngineClosedError(f"the engine thread died of {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error

    # In the thread

    def run(self) -> None:
        """Steps until it is closed, or one raises what cannot be put down to a request."""
        llm = self.open_llm()
        try:
            engine = llm.engine
            while not self.is_closed:
                for command in self._next_commands(engine):
                    command(engine)
                if engine.has_work:
                    engine.step()
        except BaseException as error:  # noqa: BLE001 - whatever it died of, nobody may be left waiting
            self._cause = error
        self._shut_down(llm)

    def _next_commands(self, engine: Engine) -> deque[Command]:
        """Commands since the last step; sleeps while there is nothing to do at all."""
        with self._wake:
            while not (self._commands or engine.has_work or self.is_closed):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        return commands

    def _shut_down(self, llm: LLM) -> None:
        with self._wake:
            self.is_closed = True
            self._llm = None
            waiting, self._waiting = self._waiting, {}
            self._commands.clear()
        for mailbox in waiting.values():
            mailbox.end(self._closed_error())
        try:
            llm.close()
        except Exception as error:  # noqa: BLE001 - it is raised by `raise_close_error`
            if self._cause is None:  # After a death the engine's state is unknown, and the callers know already.
                self._close_error = error

    def _pass_on(self, request_id: str, mailbox: Mailbox, piece: Piece) -> None:
        if not mailbox.put(piece):
            self.abandon(request_id)

    def _finish(self, output: RequestOutput) -> None:
        self._end(output.request_id, output)

    def _end(self, request_id: str, end: RequestOutput | Exception) -> None:
        with self._wake:
            mailbox = self._waiting.pop(request_id, None)
        if mailbox is not None:
            mailbox.end(end)
