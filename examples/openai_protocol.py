"""What OpenAI's API calls things: its requests as SamplingParams, and outputs as its JSON. Used by openai_server.py."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence, Sized
from contextlib import aclosing
from typing import Any

from pagedkv.engine import Completion, ContextLengthError, Piece, RequestOutput, SamplingParams
from pagedkv.engine.detokenizer import Detokenizer
from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.errors import InvalidArgumentError

SAMPLING = {"max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty"}
SAMPLING |= {"top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"}  # beyond OpenAI's
SAMPLING |= {"skip_special_tokens", "allowed_token_ids", "logit_bias"}  # The last is OpenAI's.
KNOWN = SAMPLING | {"model", "stream", "stream_options", "logprobs"}
KNOWN |= {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}
OF_COMPLETIONS, OF_CHATS = {"prompt"}, {"messages", "max_completion_tokens", "top_logprobs"}
DEFAULTS = {"best_of": 1, "response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"]}
"""What clients send and what changes nothing."""
MAX_ANSWER = 1024
"""Tokens of an answer in a chat if nothing is said, where the model's length allows as many."""
MAX_LOGPROBS = 20
"""Alternatives to a token, as OpenAI has it: each is named by calls of the tokenizer."""
Json = dict[str, Any]


def known_fields(data: bytes, *, is_chat: bool) -> Json:
    """A request's body without nulls. What is not known here might change the result, so it is refused."""
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # Half of a surrogate pair is no text.
    except (ValueError, RecursionError):
        raise InvalidArgumentError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise InvalidArgumentError(f"the body must be a JSON object, found {type(body).__name__}")
    known = KNOWN | (OF_CHATS if is_chat else OF_COMPLETIONS)
    given = {name: value for name, value in body.items() if value not in (None, False, [], {}, "")}
    unknown = [name for name, value in given.items() if name not in known and value != DEFAULTS.get(name)]
    if unknown:
        raise InvalidArgumentError(f"not supported: {', '.join(unknown)}")
    for name in ("stream_options", "metadata"):
        if not isinstance(body.get(name) or {}, dict):
            raise InvalidArgumentError(f"{name} must be an object, found {body[name]!r}")
    if not isinstance(body.get("stream") or False, bool):
        raise InvalidArgumentError(f"stream must be true or false, found {body['stream']!r:.80}")
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
    return [message | _content_of(message) for message in messages]


def _content_of(message: Json) -> Json:
    """A message's text, and the tools that an answer called: clients write their arguments as JSON, templates do so too."""
    calls = message.get("tool_calls")
    if not calls:
        return {"content": _text_of(message.get("content", ""))}
    try:
        read = [call["function"] | {"arguments": json.loads(call["function"]["arguments"])} for call in calls]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InvalidArgumentError(
            f"tool_calls must be functions with arguments in JSON, found {calls!r:.80}"
        ) from None
    with_read = [call | {"function": function} for call, function in zip(calls, read, strict=True)]
    return {"content": _text_of(message.get("content") or ""), "tool_calls": with_read}


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
    num_logprobs = body.get("top_logprobs" if is_chat else "logprobs", 0)
    if isinstance(num_logprobs, int) and num_logprobs > MAX_LOGPROBS:
        raise InvalidArgumentError(f"at most {MAX_LOGPROBS} alternatives to a token, found {num_logprobs}")
    given = {name: body[name] for name in SAMPLING & body.keys()}
    if "logit_bias" in given:
        given["logit_bias"] = _bias_of(given["logit_bias"])
    if not is_chat:
        return SamplingParams(**{"max_tokens": 16, "logprobs": body.get("logprobs")} | given)
    has_logprobs = body.get("logprobs", False)
    if not isinstance(has_logprobs, bool) or ("top_logprobs" in body and not has_logprobs):
        raise InvalidArgumentError("logprobs of a chat is true or false, and true for top_logprobs")
    num_free = MAX_ANSWER if max_length is None else max(1, max_length - max(map(len, prompts)))
    given["max_tokens"] = body.get("max_completion_tokens", body.get("max_tokens", min(num_free, MAX_ANSWER)))
    return SamplingParams(**given, logprobs=num_logprobs if has_logprobs else None)


def _bias_of(bias: Any) -> dict[int, Any]:
    """JSON has texts for keys."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (AttributeError, ValueError):
        raise InvalidArgumentError(f"logit_bias must be numbers by token id, found {bias!r:.80}") from None


class Choice:
    """One sample as JSON, whole or in pieces. `text` of a completion, `message` or `delta` of a chat."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], *, is_chat: bool) -> None:
        self._tokenizer = tokenizer
        self._before = int(prompt_token_ids[-1])
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids[-64:])
        self._num_characters = 0
        self._is_chat = is_chat
        self._is_begun = False

    def whole(self, index: int, part: Completion) -> Json:
        """The sample, numbered among all of an answer."""
        return self._with(index, part, {"message": {"role": "assistant", "content": part.text}})

    def piece(self, part: Piece) -> Json:
        """What it got since the last piece."""
        role = {} if self._is_begun else {"role": "assistant"}
        self._is_begun = True
        return self._with(part.index, part, {"delta": role | {"content": part.text}})

    def _with(self, index: int, part: Completion | Piece, of_chat: Json) -> Json:
        logprobs = None if part.logprobs is None else self._logprobs(part.logprobs)
        content = of_chat if self._is_chat else {"text": part.text}
        return {"index": index, "logprobs": logprobs, "finish_reason": part.finish_reason} | content

    def _logprobs(self, entries: Iterable[TokenLogprobs]) -> Json:
        rows, offsets = [], []
        for entry in entries:
            own = self._named(entry.token_id, entry.logprob)
            rows.append((own, [self._named(*pair) for pair in entry.alternatives.items()]))
            offsets.append(self._num_characters)
            self._num_characters += len(self._detokenizer.push([entry.token_id]))
            self._before = entry.token_id
        if self._is_chat:
            return {"content": [own | {"top_logprobs": others} for own, others in rows]}
        tokens, values = ([own[key] for own, _ in rows] for key in ("token", "logprob"))
        # The first of a name stays: the token itself, or the likeliest alternative.
        top = [{each["token"]: each["logprob"] for each in (*reversed(others), own)} for own, others in rows]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _named(self, token_id: int, logprob: float) -> Json:
        text = self._text_of(token_id)
        if "\ufffd" in text:  # A part of a character. All of them have this text, so they are told apart by number.
            return {"token": f"token_id:{token_id}", "logprob": logprob, "bytes": None}
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

    def _text_of(self, token_id: int) -> str:
        """What a token adds to the one before it: many tokenizers leave out the space before a text's first word."""
        before, both, own = map(self._decode, ([self._before], [self._before, token_id], [token_id]))
        return both[len(before) :] if both.startswith(before) else own

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def choices_of(tokenizer: Any, outputs: Iterable[RequestOutput], *, is_chat: bool) -> list[Json]:
    """All completions of these outputs, in order."""
    parts = [(output.prompt_token_ids, part) for output in outputs for part in output.completions]
    return [Choice(tokenizer, prompt, is_chat=is_chat).whole(i, part) for i, (prompt, part) in enumerate(parts)]


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


async def events_of(
    pieces: AsyncGenerator[Piece, None], first: Piece, choices: Sequence[Choice], *, head: Json, num_prompt: int | None
) -> AsyncIterator[str]:
    """Server-sent events: the pieces, of which `first` was read, the usage unless `num_prompt` is None, [DONE]."""
    num_new, piece = 0, first
    head = head if num_prompt is None else head | {"usage": None}
    async with aclosing(pieces):
        try:
            while piece is not None:
                num_new += len(piece.token_ids)
                yield f"data: {json.dumps(head | {'choices': [choices[piece.index].piece(piece)]})}\n\n"
                piece = await anext(pieces, None)
        except Exception as cause:  # noqa: BLE001 - the status was sent already; the stream itself says what happened
            yield f"data: {json.dumps(error(500, cause))}\n\n"
            return
    if num_prompt is not None:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(num_prompt, num_new)})}\n\n"
    yield "data: [DONE]\n\n"


def model_card(name: str, created: int) -> Json:
    """A model in a list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "pagedkv"}


def error(status: int, cause: object) -> Json:
    """The body of an answer with this status."""
    code = "context_length_exceeded" if isinstance(cause, ContextLengthError) else None
    if status == 404 and str(cause).startswith("the model "):
        code = "model_not_found"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": str(cause), "type": kind, "param": None, "code": code}}
