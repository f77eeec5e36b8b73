"""An OpenAI-compatible server: completions and chats, whole or streamed. Try `python examples/openai_server.py`."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import openai_protocol as protocol
import uvicorn
from openai_protocol import Json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tiny_model import model_and_tokenizer

from pagedkv.engine import LLM, AsyncLLM, EngineClosedError, SamplingParams
from pagedkv.engine.metrics import PrometheusExporter
from pagedkv.errors import InvalidArgumentError, PagedKVError
from pagedkv.scheduler import QueueFullError, SchedulerConfig

NO_TOKENS = SamplingParams(max_tokens=0)


class Server:
    """The routes over one engine."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm = llm
        self.name = name
        self.card = protocol.model_card(name, int(time.time()))
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={
                HTTPException: lambda _, cause: refusal(cause.status_code, cause.detail),
                InvalidArgumentError: lambda _, cause: refusal(400, cause),
                QueueFullError: lambda _, cause: refusal(429, cause),
                EngineClosedError: lambda _, cause: refusal(503, cause),
                PagedKVError: lambda _, cause: refusal(500, cause),
                Exception: lambda _, cause: refusal(500, f"an internal error: {type(cause).__name__}"),
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.exporter = PrometheusExporter(self.llm.metrics, labels={"model_name": self.name})
        async with AsyncLLM(self.llm) as self.engine:
            yield

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card]})

    async def _model(self, request: Request) -> Response:
        self._require_name(request.path_params["name"])
        return JSONResponse(self.card)

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=503 if self.engine.is_closed else 200)

    async def _metrics(self, _request: Request) -> Response:
        return PlainTextResponse(self.exporter.text(), headers={"content-type": self.exporter.content_type})

    async def _completions(self, request: Request) -> Response:
        body = await self._read(request, is_chat=False)
        prompts = [(await self.engine.check(each, NO_TOKENS))[0] for each in protocol.prompts_of(body)]
        return await self._answer(request, body, prompts, is_chat=False)

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, is_chat=True)
        prompt = await self.engine.chat_prompt(protocol.messages_of(body))
        return await self._answer(request, body, [prompt], is_chat=True)

    async def _read(self, request: Request, *, is_chat: bool) -> Json:
        body = protocol.known_fields(await request.body(), is_chat=is_chat)
        self._require_name(body.get("model", self.name))
        return body

    def _require_name(self, name: object) -> None:
        if name != self.name:
            raise HTTPException(404, f"the model {name!r} is not here, only {self.name!r}")

    async def _answer(self, request: Request, body: Json, prompts: list[Any], *, is_chat: bool) -> Response:
        params = protocol.params_of(body, prompts, self.llm.max_length, is_chat=is_chat)
        client = protocol.client_of(body)
        head = protocol.head_of(self.name, is_chat=is_chat, is_stream=bool(body.get("stream")))
        if not body.get("stream"):
            work = (self.engine.generate(prompt, params, client=client) for prompt in prompts)
            outputs = await while_connected(request, all_of(work))
            choices = protocol.choices_of(self.llm.tokenizer, outputs, is_chat=is_chat)
            return JSONResponse(head | {"choices": choices, "usage": protocol.usage_of(outputs)})
        pieces = self.engine.stream(prompts[0], params, client=client)
        first = await while_connected(request, anext(pieces))  # An error until here still has a status of its own.
        choices = [protocol.Choice(self.llm.tokenizer, prompts[0], is_chat=is_chat) for _ in range(params.n)]
        num_prompt = len(prompts[0]) if body.get("stream_options", {}).get("include_usage") else None
        events = protocol.events_of(pieces, first, choices, head=head, num_prompt=num_prompt)
        return StreamingResponse(events, media_type="text/event-stream")


def refusal(status: int, cause: object) -> Response:
    """An error as OpenAI's clients know it."""
    return JSONResponse(protocol.error(status, cause), status)


async def all_of(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What all of them give; if one raises, the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives; it is cancelled if the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder of a model of transformers; none: a tiny random one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--client-share", type=float, help="what one `user` may take of seats and blocks; none: all")
    options = parser.parse_args()
    limits = SchedulerConfig(2048, 256, client_share=options.client_share)
    llm = LLM(*model_and_tokenizer(options.model), scheduler_config=limits)
    app = Server(llm, options.model or "tiny").app
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=10)
