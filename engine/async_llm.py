"""AsyncLLM: one engine thread that serves any number of asyncio callers."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from pagedkv.arrays import Int32s
from pagedkv.engine.engine_thread import EngineThread
from pagedkv.engine.llm import LLM, Message, TextOrTokens
from pagedkv.engine.mailbox import Mailbox
from pagedkv.engine.metrics import MetricsSnapshot
from pagedkv.engine.outputs import Piece, RequestOutput
from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["AsyncLLM"]


class AsyncLLM:
    """Takes over an LLM and serves it to asyncio callers, of one event loop or of several in as many threads.

        async with AsyncLLM(LLM("Qwen/Qwen3-0.6B")) as engine:
            async for piece in engine.stream("The capital of France is", SamplingParams(max_tokens=8)):
                print(piece.text, end="", flush=True)

    The engine's steps run in a thread of their own, which sleeps while there is nothing to do. Requests are added and
    aborted between two steps. From now on the LLM belongs to that thread: what others do with it raises EngineClosedError.

    The thread is a daemon, so that a forgotten `close` cannot hang the interpreter's exit, and the exit closes the engine,
    so that the files it writes are completed. Dropping the last reference closes it too, with a ResourceWarning. If the
    thread dies of an unexpected exception, everybody who waits, and who calls later, gets EngineClosedError with that
    exception as its cause.
    """

    def __init__(self, llm: LLM) -> None:
        """Start the engine thread. Raises EngineClosedError if the LLM was closed, or another AsyncLLM has it."""
        self._thread = EngineThread(llm)
        self._thread.start()
        self._forsaken = weakref.finalize(self, self._thread.forsake)
        self._forsaken.atexit = False  # The thread sees to the interpreter's exit, and waits there.

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
                self._thread.abandon(request_id)
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
        return await self._complete(prompt, params, arrival_s=self._now(), priority=priority, salt=salt, client=client)

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
                self._thread.abandon(request_id)
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
        return await self._complete(prompt, params, arrival_s=arrival_s, priority=priority, salt=salt, client=client)

    async def chat_prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises InvalidArgumentError without a template, EngineClosedError.
        """
        return await asyncio.to_thread(partial(self._thread.open_llm().chat_prompt, messages, **template))

    async def check(self, prompt: TextOrTokens, params: SamplingParams | None = None) -> tuple[Int32s, SamplingParams]:
        """The prompt's token ids, (n,) int32, and its parameters, after every check that needs no queue.

        The event loop goes on meanwhile: long texts are tokenized in a thread of the loop's executor.
        Raises InvalidArgumentError, RequestTooLargeError, EngineClosedError.
        """
        return await asyncio.to_thread(self._thread.open_llm().check, prompt, params)

    def metrics(self) -> MetricsSnapshot:
        """Counters, gauges and histograms as they are now; from any thread. Raises EngineClosedError. O(buckets)."""
        return self._thread.open_llm().metrics()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no requests any more, closed or dead."""
        return self._thread.is_closed

    async def close(self) -> None:
        """Abort what is under way, whose callers get EngineClosedError, and close the LLM. Closing twice does nothing.

        Raises what closing the LLM raised, if a file could not be completed.
        """
        self._forsaken.detach()
        await asyncio.to_thread(self._thread.stop)
        self._thread.raise_close_error()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # From the callers' threads

    async def _submit(
        self, prompt: TextOrTokens, params: SamplingParams | None, *, streams: bool, **asked: Any
    ) -> tuple[str, Mailbox]:
        token_ids, checked = await asyncio.to_thread(self._thread.open_llm().prepare, prompt, params)
        text = prompt if isinstance(prompt, str) else None
        return self._thread.submit(token_ids, checked, streams=streams, prompt=text, **asked)

    def _now(self) -> float:
        """The time on the engine's clock. Raises EngineClosedError."""
        return self._thread.open_llm().engine.clock()


def _output_of(end: RequestOutput | Exception) -> RequestOutput:
    """The output of a request that ended by itself. Raises what ended it otherwise."""
    if isinstance(end, Exception):
        raise end
    if end.error is not None:
        raise end.error
    return end
