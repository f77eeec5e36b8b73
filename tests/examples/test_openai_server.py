"""The OpenAI-compatible server, driven by OpenAI's own client over a loopback port."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pagedkv.engine import LLM, Completion
from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.scheduler import QueueFullError

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from openai_protocol import Choice
from openai_server import Server
from tiny_model import byte_tokenizer, tiny_llama

GREEDY = {"temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


class Served:
    """A server in a thread of its own, on a free port."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        tokenizer = byte_tokenizer()
        self.llm = LLM(tiny_llama(tokenizer), tokenizer, num_blocks=160, block_size=16)
        self.scheduler = self.llm.engine.scheduler
        self.server = Server(self.llm, "tiny")
        config = uvicorn.Config(self.server.app, port=0, log_level="warning", timeout_graceful_shutdown=2)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about within a minute"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **(GREEDY | options))


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **(GREEDY | options))


def test_the_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    models = list(client.models.list())

    assert [model.id for model in models] == ["tiny"]
    assert abs(models[0].created - time.time()) < 3600
    assert client.models.retrieve("tiny") == models[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("large/one")
    assert caught.value.code == "model_not_found"


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    answer = complete(client, "Hello")

    assert answer.object == "text_completion"
    assert len(answer.choices[0].text) == 12
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)


def test_streamed_pieces_make_up_the_whole_completion(client: openai.OpenAI) -> None:
    whole = complete(client, "Hello").choices[0].text

    chunks = list(complete(client, "Hello", stream=True, stream_options={"include_usage": True}))

    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("has_usage", [False, True])
def test_chunks_have_an_empty_usage_if_one_is_asked_for(served: Served, has_usage: bool) -> None:
    body = {"prompt": "Hello", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": has_usage}}

    lines = httpx.post(f"{served.url}/v1/completions", json=body).text.splitlines()

    assert ('"usage": null' in lines[0]) == has_usage


def test_several_prompts_and_samples_are_numbered_in_order(client: openai.OpenAI) -> None:
    answer = complete(client, ["abc", [72, 72]], n=2, temperature=1, seed=7)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == complete(client, "abc", temperature=1, seed=7).choices[0].text
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.prompt_tokens == 5


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = complete(client, "Hello").choices[0].text

    cut = complete(client, "Hello", stop=[whole[4:6]]).choices[0]

    assert cut.text == whole[: whole.index(whole[4:6])]
    assert cut.finish_reason == "stop"


def test_logprobs_of_a_completion_name_the_alternatives(client: openai.OpenAI) -> None:
    choice = complete(client, "Hello", logprobs=2, max_tokens=3).choices[0]

    assert "".join(choice.logprobs.tokens) == choice.text
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2


def test_a_token_that_is_none_of_the_likeliest_is_named_beside_them(client: openai.OpenAI) -> None:
    logprobs = complete(client, "Hello", logprobs=1, temperature=1.5, seed=2).choices[0].logprobs

    assert {len(top) for top in logprobs.top_logprobs} == {1, 2}
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def named_logprobs(tokenizer: Any, entries: list[TokenLogprobs], *, is_chat: bool) -> Any:
    part = Completion(0, tuple(entry.token_id for entry in entries), "", "length", logprobs=tuple(entries))
    return Choice(tokenizer, [entries[0].token_id], is_chat=is_chat).whole(0, part)["logprobs"]


def test_alternatives_that_are_parts_of_characters_are_told_apart() -> None:
    tokenizer = byte_tokenizer()
    letter, *parts = tokenizer("aé漢")["input_ids"]
    entry = TokenLogprobs(letter, -0.5, 1, {letter: -0.5} | {token_id: -2.0 - i for i, token_id in enumerate(parts)})

    completion = named_logprobs(tokenizer, [entry], is_chat=False)
    chat = named_logprobs(tokenizer, [entry], is_chat=True)

    names = ["a", *(f"token_id:{token_id}" for token_id in parts)]
    assert completion["top_logprobs"] == [dict(zip(names, [-0.5, -2.0, -3.0, -4.0, -5.0, -6.0], strict=True))]
    assert [each["token"] for each in chat["content"][0]["top_logprobs"]] == names


def test_tokens_add_up_to_the_text_and_have_their_places_in_it() -> None:
    unknown = "<unk>"
    vocabulary = {unknown: 0, "▁Hello": 1, "▁world": 2, "▁a": 3, "<0xC3>": 4, "<0xA9>": 5, "!": 6}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token=unknown)
    entries = [TokenLogprobs(token_id, -0.5, 1, {}) for token_id in (1, 2, 3, 4, 5, 6)]

    logprobs = named_logprobs(tokenizer, entries, is_chat=False)

    assert logprobs["tokens"] == [" Hello", " world", " a", "token_id:4", "token_id:5", "!"]
    assert logprobs["text_offset"] == [0, 6, 12, 14, 14, 15]


def test_streamed_tokens_have_their_places_in_the_whole_text(client: openai.OpenAI) -> None:
    whole = complete(client, "Hello", logprobs=0).choices[0].logprobs

    chunks = list(complete(client, "Hello", logprobs=0, stream=True))

    assert whole.text_offset == list(range(12))
    assert [place for chunk in chunks for place in chunk.choices[0].logprobs.text_offset] == whole.text_offset


def test_a_chat_is_answered_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    whole = chat(client, max_completion_tokens=9)
    chunks = list(chat(client, stream=True, max_completion_tokens=9))

    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].message.content) == 9
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_streamed_chat_of_two_samples_has_both(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}

    for chunk in chat(client, stream=True, n=2, temperature=1, seed=3):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""

    whole = chat(client, n=2, temperature=1, seed=3)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_logprobs_of_a_chat_have_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=2)
    entries = answer.choices[0].logprobs.content

    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert [len(entry.top_logprobs) for entry in entries] == [3, 3]
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert chat(client, max_tokens=2).choices[0].logprobs is None


def test_parts_of_a_message_are_joined(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]

    answer = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)

    assert answer.choices[0].message.content == chat(client).choices[0].message.content


def test_the_second_turn_of_a_chat_reports_cached_tokens(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "What was it that I said about the weather of last Sunday?"}

    def ask(messages: list[Any]) -> Any:
        return client.chat.completions.create(model="tiny", messages=messages, **GREEDY)

    first = ask([question])
    said = {"role": "assistant", "content": first.choices[0].message.content}
    second = ask([question, said, question])

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n must be"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 100_000}, "positions"),
        ({"max_tokens": 5000}, "can never run"),
        ({"logit_bias": {"five": 10}}, "logit_bias must be numbers by token id"),
        ({"logit_bias": {"5": 1000}}, "logit_bias must be in"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"stream": "no"}, "stream must be true or false"),
        ({"logprobs": 21}, "at most 20 alternatives"),
        ({"extra_body": {"max_completion_tokens": 3}}, "not supported: max_completion_tokens"),
        ({"extra_body": {"top_logprobs": 3}}, "not supported: top_logprobs"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": [[1], "a", 3]}, "prompt"),
        ({"prompt": [100_000]}, "tokens 0..259"),
        ({"prompt": ["a", "b"], "stream": True}, "one prompt"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_with_400(
    client: openai.OpenAI, options: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, **({"prompt": "a", "stream": stream} | options))

    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": [{"image": 1}]}]],
)
def test_messages_of_another_form_are_refused_with_400(client: openai.OpenAI, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "at most 20 alternatives"),
        ({"top_logprobs": 2}, "logprobs of a chat"),
        ({"extra_body": {"logprobs": 2}}, "logprobs of a chat"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content must be text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]}, "tool_calls"),
    ],
    ids=str,
)
def test_what_a_chat_cannot_do_is_refused_with_400(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | options))


def test_an_answer_that_called_a_tool_needs_no_content(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"day": "Sunday"}'}}
    called = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]

    answer = client.chat.completions.create(model="tiny", messages=called, **GREEDY)

    said = [*MESSAGES, {"role": "assistant", "content": ""}]
    same = client.chat.completions.create(model="tiny", messages=said, **GREEDY)
    assert answer.choices[0].message.content == same.choices[0].message.content


def test_a_bias_by_token_id_is_taken(client: openai.OpenAI) -> None:
    token_id = byte_tokenizer()("q")["input_ids"][0]

    assert complete(client, "Hello", logit_bias={str(token_id): 100}).choices[0].text == "q" * 12
    assert chat(client, extra_body={"allowed_token_ids": [token_id]}).choices[0].message.content == "q" * 12


def test_defaults_of_what_is_not_known_pass(client: openai.OpenAI) -> None:
    assert complete(client, "Hello", best_of=1).choices[0].text == complete(client, "Hello").choices[0].text
    asked = {"response_format": {"type": "text"}, "tool_choice": "none"}
    assert chat(client, **asked).choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_text_beyond_the_models_positions_has_a_code_of_its_own(client: openai.OpenAI, max_tokens: int) -> None:
    with pytest.raises(openai.BadRequestError, match="a prompt of 9000 tokens exceeds the model's 8192") as caught:
        complete(client, "a" * 9000, max_tokens=max_tokens)

    assert caught.value.code == "context_length_exceeded"


def test_parameters_without_effect_pass(client: openai.OpenAI) -> None:
    answer = complete(client, "Hello", user="me", echo=False, logit_bias={}, extra_body={"top_k": 1, "temperature": 1})

    assert answer.choices[0].text == complete(client, "Hello").choices[0].text


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="large", prompt="a")

    assert caught.value.code == "model_not_found"


def test_a_broken_body_is_refused_and_unknown_paths_are_not_found(served: Served) -> None:
    broken = httpx.post(f"{served.url}/v1/completions", content=b"{")
    listed = httpx.post(f"{served.url}/v1/completions", content=b"[1]")
    strange = [
        httpx.post(f"{served.url}/v1/{path}", content=body)
        for path in ("completions", "chat/completions")
        for body in (
            b"[" * 200_000,
            b'{"prompt": "\\ud800"}',
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"\\ud800": 1, "prompt": "a"}',
        )
    ]
    nowhere = httpx.get(f"{served.url}/v1/nothing")

    assert (broken.status_code, broken.json()["error"]["message"]) == (400, "the body is not JSON")
    assert listed.status_code == 400
    assert [(each.status_code, each.json()["error"]["type"]) for each in strange] == [
        (400, "invalid_request_error")
    ] * 8
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, None)


def test_health_and_metrics_are_there(served: Served, client: openai.OpenAI) -> None:
    complete(client, "Hello")

    assert httpx.get(f"{served.url}/health").status_code == 200
    answer = httpx.get(f"{served.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'pagedkv:generation_tokens_total{model_name="tiny"}' in answer.text


def test_many_asynchronous_clients_get_what_one_alone_gets(served: Served, client: openai.OpenAI) -> None:
    prompts = [f"prompt {i}" for i in range(12)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as asking:

            async def ask(prompt: str) -> str:
                stream = await asking.completions.create(model="tiny", prompt=prompt, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, prompts))

    assert asyncio.run(ask_all()) == [complete(client, prompt).choices[0].text for prompt in prompts]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_aborts_its_request(served: Served, client: openai.OpenAI, stream: bool) -> None:
    num_aborted = served.llm.metrics().request_success["abort"]
    body = {"prompt": "Hello", "max_tokens": 2400, "temperature": 0, "stream": stream, "ignore_eos": True}

    if stream:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.3))

    wait_until(lambda: served.llm.metrics().request_success["abort"] == num_aborted + 1)
    assert served.scheduler.manager.statistics().num_used == 0
    assert len(complete(client, "Hello").choices[0].text) == 12


def test_a_prompt_that_is_refused_takes_the_others_of_its_request_back(served: Served, client: openai.OpenAI) -> None:
    num_generated = served.llm.metrics().generation_tokens

    with pytest.raises(openai.BadRequestError, match="can never run"):
        complete(client, ["short", "x" * 1000], max_tokens=2000, extra_body={"ignore_eos": True})

    wait_until(lambda: not served.scheduler.has_work)
    assert served.llm.metrics().generation_tokens - num_generated < 1000


def test_a_client_that_leaves_several_prompts_leaves_nothing_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    num_aborted = served.llm.metrics().request_success["abort"]
    body = {"prompt": ["a", "b", "c"], "max_tokens": 800, "ignore_eos": True}

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.3))

    wait_until(lambda: served.llm.metrics().request_success["abort"] == num_aborted + 3)
    httpx.get(f"{served.url}/health")  # By now the loop has gone round.
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_what_nobody_foresaw_is_an_error_in_json(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(served.server.engine, "chat_prompt", fail)

    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": MESSAGES})

    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "an internal error: RuntimeError")
    assert answer.json()["error"]["type"] == "server_error"


def test_a_failure_in_the_middle_of_a_stream_is_told_in_the_stream(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served.llm.engine.model
    forward = model.forward

    def fail_at_ten(step: Any) -> Any:
        if int(step.positions.max()) >= 10:
            raise RuntimeError("a device was lost")
        return forward(step)

    monkeypatch.setattr(model, "forward", fail_at_ten)
    pieces: list[str] = []
    with pytest.raises(openai.APIError, match="a device was lost"):
        pieces.extend(chunk.choices[0].text for chunk in complete(client, "Hello", stream=True))
    with pytest.raises(openai.InternalServerError, match="a device was lost"):
        complete(client, "Hello")

    monkeypatch.undo()
    assert complete(client, "Hello").choices[0].text.startswith("".join(pieces))


def test_the_user_of_a_request_is_its_client(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    add = served.scheduler.add
    monkeypatch.setattr(served.scheduler, "add", lambda request, now: (seen.append(request.client), add(request, now)))

    complete(client, "Hello", user="ann")
    list(complete(client, "Hello", user="bob", stream=True))
    chat(client, safety_identifier="cleo")
    chat(client)

    assert seen == ["ann", "bob", "cleo", None]


def test_a_client_that_has_too_many_requests_is_told_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise QueueFullError("2 requests of its client are here, no more may be")

    monkeypatch.setattr(served.scheduler, "add", refuse)

    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"})

    assert answer.status_code == 429
    assert "of its client" in answer.json()["error"]["message"]
