"""What OpenAI's API calls things: its requests as SamplingParams, and outputs as its JSON. Used by openai_server.py."""

import json
import time
import uuid
from collections.abc import Iterable, Sequence, Sized
from typing import Any

from pagedkv.engine import Completion, Piece, RequestOutput, SamplingParams
from pagedkv.errors import InvalidArgumentError

SAMPLING = {"max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty"}
SAMPLING |= {"top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"}  # beyond OpenAI's
KNOWN = SAMPLING | {"model", "prompt", "messages", "stream", "stream_options", "logprobs", "top_logprobs"}
KNOWN |= {"max_completion_tokens", "user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}
MAX_ANSWER = 1024
"""Tokens of an answer in a chat if nothing is said, where the model's length allows as many."""
Json = dict[str, Any]


def known_fields(data: bytes) -> Json:
    """A request's body without nulls. What is not known here might change the result, so it is refused."""
    try:
        body = json.loads(data)
    except ValueError:  # No UTF-8, or no JSON.
        raise InvalidArgumentError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise InvalidArgumentError(f"the body must be a JSON object, found {type(body).__name__}")
    unknown = [name for name, value in body.items() if name not in KNOWN and value not in (None, False, [], {}, "")]
    if unknown:
        raise InvalidArgumentError(f"not supported: {', '.join(unknown)}")
    for name in ("stream_options", "metadata"):
        if not isinstance(body.get(name) or {}, dict):
            raise InvalidArgumentError(f"{name} must be an object, found {body[name]!r}")
    return {name: value for name, value in body.items() if value is not None}


def client_of(body: Json) -> str | None:
    """Who asks, as far as the request tells: whose share of the engine it takes."""
    client = body.get("user", body.get("safety_identifier"))
    if not isinstance(client, str | None):
        raise InvalidArgumentError(f"user must be a text, found {client!r:.80}")
    return client


def messages_of(body: Json) -> list[Json]:
    """The messages of a chat; their parts of text are joined."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidArgumentError("messages must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidArgumentError(f"a message must be an object with a role, found {message!r}")
    return [message | {"content": _text_of(message.get("content", ""))} for message in messages]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise InvalidArgumentError(f"a message's content must be text, found {content!r:.80}")
    return "".join(part["text"] for part in parts)


def prompts_of(body: Json) -> list[Any]:
    """The prompts of a completion, texts or rows of token ids; one of either stands for itself."""
    prompt = body.get("prompt")
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if not all(isinstance(each, str | list) for each in several):
        raise InvalidArgumentError("prompt must be a text, token ids, or a list of either")
    return several


def params_of(body: Json, prompts: Sequence[Sized], max_length: int | None, *, is_chat: bool) -> SamplingParams:
    """How to sample after these prompts of token ids, for a model that has `max_length` positions, None if any number."""
    if body.get("stream") and len(prompts) != 1:
        raise InvalidArgumentError("a stream takes one prompt")
    given = {name: body[name] for name in SAMPLING & body.keys()}
    if not is_chat:
        return SamplingParams(**{"max_tokens": 16, "logprobs": body.get("logprobs")} | given)
    num_free = MAX_ANSWER if max_length is None else max(1, max_length - max(map(len, prompts)))
    given["max_tokens"] = body.get("max_completion_tokens", body.get("max_tokens", min(num_free, MAX_ANSWER)))
    return SamplingParams(**given, logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None)


def choices_of(tokenizer: Any, outputs: Iterable[RequestOutput], *, is_chat: bool) -> list[Json]:
    """All completions of these outputs, in order."""
    parts = [part for output in outputs for part in output.completions]
    contents = [
        {"message": {"role": "assistant", "content": part.text}} if is_chat else {"text": part.text} for part in parts
    ]
    return [_choice(tokenizer, i, part, content) for i, (part, content) in enumerate(zip(parts, contents, strict=True))]


def chunk_of(tokenizer: Any, piece: Piece, *, is_chat: bool, is_first: bool) -> Json:
    """A piece of a completion."""
    role = {"role": "assistant"} if is_first else {}
    content = {"delta": role | {"content": piece.text}} if is_chat else {"text": piece.text}
    return _choice(tokenizer, piece.index, piece, content)


def _choice(tokenizer: Any, index: int, part: Completion | Piece, content: Json) -> Json:
    logprobs = None if part.logprobs is None else _logprobs(tokenizer, part.logprobs, is_chat="text" not in content)
    return {"index": index, "logprobs": logprobs, "finish_reason": part.finish_reason} | content


def _logprobs(tokenizer: Any, entries: Iterable[Any], *, is_chat: bool) -> Json:
    def named(token_id: int, logprob: float) -> Json:
        token = tokenizer.decode([token_id])
        return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else [*token.encode()]}

    rows = [(named(e.token_id, e.logprob), [named(*pair) for pair in e.alternatives.items()]) for e in entries]
    if is_chat:
        return {"content": [own | {"top_logprobs": others} for own, others in rows]}
    top = [{each["token"]: each["logprob"] for each in (*others, own)} for own, others in rows]
    tokens, values = ([own[key] for own, _ in rows] for key in ("token", "logprob"))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}


def head_of(model: str, *, is_chat: bool, is_stream: bool) -> Json:
    """What every answer, and every piece of a streamed one, begins with."""
    kind = "chat.completion" if is_chat else "text_completion"
    shown = "chat.completion.chunk" if is_chat and is_stream else kind
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": shown, "created": int(time.time()), "model": model}


def usage(num_prompt: int, num_new: int, **more: Json) -> Json:
    """Counts of tokens."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new} | more


def usage_of(outputs: Iterable[RequestOutput]) -> Json:
    """The counts of whole outputs, with the tokens that the prefix cache had."""
    outputs = list(outputs)
    num_new = sum(len(part.token_ids) for output in outputs for part in output.completions)
    cached = {"cached_tokens": sum(output.timings.num_cached_tokens for output in outputs)}
    return usage(sum(len(output.prompt_token_ids) for output in outputs), num_new, prompt_tokens_details=cached)


def error(status: int, message: str) -> Json:
    """The body of an answer with this status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 and message.startswith("the model ") else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
