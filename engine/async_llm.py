"""AsyncLLM: one engine thread that serves any number of asyncio callers."""

from __future__ import annotations

import asyncio
import atexit
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from threading import Condition, Thread
from types import TracebackType
from typing import Any

from pagedkv.arrays import Int32s
from pagedkv.engine.core import Engine
from pagedkv.engine.errors import EngineClosedError
from pagedkv.engine.llm import LLM, Message, TextOrTokens
from pagedkv.engine.mailbox import Mailbox
from pagedkv.engine.metrics import MetricsSnapshot
from pagedkv.engine.outputs import Piece, RequestOutput
from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["AsyncLLM"]

Command = Callable[[Engine], None]
"""What the engine thread is to do between two steps."""
EXIT_PATIENCE_S = 30.0
"""How long the interpreter's exit waits for the step under way."""


class AsyncLLM:
    """Takes over an LLM and serves it to asyncio callers, of one event loop or of several in as many threads.

        async with AsyncLLM(LLM("Qwen/Qwen3-0.6B")) as engine:
            async for piece in engine.stream("The capital of France is", SamplingParams(max_tokens=8)):
                print(piece.text, end="", flush=True)

    The engine's steps run in a thread of their own, which sleeps while there is nothing to do. Requests are added and
    aborted between two steps. From now on the LLM belongs to that thread: what others do with it raises EngineClosedError.

    The thread is a daemon, so that a forgotten `close` cannot hang the interpreter's exit, and the exit closes the engine,
    so that the files it writes are completed. If the thread dies of an unexpected exception, everybody who waits, and who
    calls later, gets EngineClosedError with that exception as its cause.
    """

    def __init__(self, llm: LLM) -> None:
        """Start the engine thread. Raises EngineClosedError if the LLM was closed, or another AsyncLLM has it."""
        self._llm: LLM | None = llm
        """None once it was closed: who still holds this holds no K/V memory."""
        self._wake = Condition()
        """Its lock guards what follows."""
        self._commands: deque[Command] = deque()
        self._waiting: dict[str, Mailbox] = {}
        self._is_closed = False
        self._cause: BaseException | None = None
        """What the engine thread died of."""
        self._close_error: Exception | None = None
        self._numbers = itertools.count(1)
        self._thread = Thread(target=self._run, args=(llm, llm.engine), name="pagedkv-engine", daemon=True)
        llm.engine.take_over(self._thread)
        self._thread.start()
        atexit.register(self._stop, EXIT_PATIENCE_S)

    # Callers

    async def stream(
        self,
        prompt: TextOrTokens,
        params: SamplingParams | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Complete a prompt, and yield pieces as they come; each holds all that its sample got since the last one.

        A slow reader gets fewer and longer pieces, and holds nobody up. Cancelling the task or closing the generator aborts
        the request.

        Raises InvalidArgumentError, RequestTooLargeError, QueueFullError, EngineClosedError, and what ended the request if it
        did not end by itself, after the pieces until then.
        """
        request_id, mailbox = await self._submit(
            prompt, params, arrival_s=self._now(), streams=True, priority=priority, salt=salt, client=client
        )
        end: RequestOutput | Exception | None = None
        try:
            while end is None:
                pieces, end = await mailbox.take()
                for piece in pieces:
                    yield piece
        finally:
            if end is None:
                self._abandon(request_id)
        _output_of(end)

    async def generate(
        self,
        prompt: TextOrTokens,
        params: SamplingParams | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
    ) -> RequestOutput:
        """Complete a prompt. Cancelling the task aborts the request. Raises as `stream` does."""
        return await self._complete(
            prompt, params, arrival_s=self._now(), priority=priority, salt=salt, client=client
        )

    async def _complete(
        self, prompt: TextOrTokens, params: SamplingParams | None, *, arrival_s: float, **asked: Any
    ) -> RequestOutput:
        request_id, mailbox = await self._submit(prompt, params, arrival_s=arrival_s, streams=False, **asked)
        end: RequestOutput | Exception | None = None
        try:
            while end is None:
                _, end = await mailbox.take()
        finally:
            if end is None:
                self._abandon(request_id)
        return _output_of(end)

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
        **template: Any,
    ) -> RequestOutput:
        """Answer a conversation by the tokenizer's chat template, which gets `template`. Raises as `stream` does.

        To stream the answer: `engine.stream(await engine.chat_prompt(messages))`.
        """
        arrival_s = self._now()
        prompt = await self.chat_prompt(messages, **template)
        return await self._complete(
            prompt, params, arrival_s=arrival_s, priority=priority, salt=salt, client=client
        )

    async def chat_prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises InvalidArgumentError without a template, EngineClosedError.
        """
        return await asyncio.to_thread(partial(self._open_llm().chat_prompt, messages, **template))

    async def check(self, prompt: TextOrTokens, params: SamplingParams | None = None) -> tuple[Int32s, SamplingParams]:
        """The prompt's token ids, (n,) int32, and its parameters, after every check that needs no queue.

        The event loop goes on meanwhile: long texts are tokenized in a thread of the loop's executor.
        Raises InvalidArgumentError, RequestTooLargeError, EngineClosedError.
        """
        return await asyncio.to_thread(self._open_llm().check, prompt, params)

    def metrics(self) -> MetricsSnapshot:
        """Counters, gauges and histograms as they are now; from any thread. Raises EngineClosedError. O(buckets)."""
        return self._open_llm().metrics()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no requests any more, closed or dead."""
        return self._is_closed

    async def close(self) -> None:
        """Abort what is under way, whose callers get EngineClosedError, and close the LLM. Closing twice does nothing.

        Raises what closing the LLM raised, if a file could not be completed.
        """
        await asyncio.to_thread(self._stop)
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # From the callers' threads

    async def _submit(
        self,
        prompt: TextOrTokens,
        params: SamplingParams | None,
        *,
        arrival_s: float,
        streams: bool,
        priority: float,
        salt: bytes,
        client: str | int | None,
    ) -> tuple[str, Mailbox]:
        token_ids, checked = await asyncio.to_thread(self._open_llm().prepare, prompt, params)
        mailbox = Mailbox(asyncio.get_running_loop())
        request_id = f"async-{next(self._numbers)}"

        def add(engine: Engine) -> None:
            try:
                engine.add(
                    request_id,
                    token_ids,
                    checked,
                    prompt=prompt if isinstance(prompt, str) else None,
                    on_piece=partial(self._pass_on, request_id, mailbox) if streams else None,
                    on_finish=self._finish,
                    priority=priority,
                    salt=salt,
                    client=client,
                    arrival_s=arrival_s,
                )
            except Exception as error:  # noqa: BLE001 - what one caller's arguments raise is that caller's, whatever it is
                self._end(request_id, error)

        with self._wake:
            self._open_llm()
            self._waiting[request_id] = mailbox
            self._commands.append(add)
            self._wake.notify()
        return request_id, mailbox

    def _abandon(self, request_id: str) -> None:
        """Nobody waits for this request any more: have it aborted before the next step."""

        def abort(engine: Engine) -> None:
            if engine.is_live(request_id):
                engine.abort(request_id)

        with self._wake:
            self._waiting.pop(request_id, None)
            self._commands.append(abort)
            self._wake.notify()

    def _now(self) -> float:
        """The time on the engine's clock. Raises EngineClosedError."""
        return self._open_llm().engine.clock()

    def _open_llm(self) -> LLM:
        """Raises EngineClosedError."""
        llm = self._llm
        if self._is_closed or llm is None:
            raise self._closed_error()
        return llm

    def _closed_error(self) -> EngineClosedError:
        """A new one for each who gets it: a raised exception keeps the frames it went through."""
        if self._cause is None:
            return EngineClosedError("the engine was closed")
        error = EngineClosedError(f"the engine thread died of {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error

    def _stop(self, patience_s: float | None = None) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(patience_s)
        atexit.unregister(self._stop)

    # The engine thread

    def _run(self, llm: LLM, engine: Engine) -> None:
        try:
            while not self._is_closed:
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
            while not (self._commands or engine.has_work or self._is_closed):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        return commands

    def _shut_down(self, llm: LLM) -> None:
        with self._wake:
            self._is_closed = True
            self._llm = None
            waiting, self._waiting = self._waiting, {}
            self._commands.clear()
        for mailbox in waiting.values():
            mailbox.end(self._closed_error())
        try:
            llm.close()
        except Exception as error:  # noqa: BLE001 - it is raised by `close`
            if self._cause is None:  # After a death the engine's state is unknown, and the callers know already.
                self._close_error = error

    def _pass_on(self, request_id: str, mailbox: Mailbox, piece: Piece) -> None:
        if not mailbox.put(piece):
            self._abandon(request_id)

    def _finish(self, output: RequestOutput) -> None:
        self._end(output.request_id, output)

    def _end(self, request_id: str, end: RequestOutput | Exception) -> None:
        with self._wake:
            mailbox = self._waiting.pop(request_id, None)
        if mailbox is not None:
            mailbox.end(end)


def _output_of(end: RequestOutput | Exception) -> RequestOutput:
    """The output of a request that ended by itself. Raises what ended it otherwise."""
    if isinstance(end, Exception):
        raise end
    if end.error is not None:
        raise end.error
    return end
