"""The forms in which a caller may give prompts, and what becomes of them: texts, and rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pagedkv.errors import InvalidArgumentError

__all__ = ["Message", "TextOrTokens", "as_conversations", "as_messages", "as_prompt", "as_prompts"]

TextOrTokens: TypeAlias = str | Sequence[int] | NDArray[np.integer[Any]] | Tensor | Mapping[str, Any]
"""A prompt: a text, for which LLM needs a tokenizer; or token ids: a row of numbers, an array or tensor of one, or what a
tokenizer returned, of which the tokens that its `attention_mask` leaves out are no part."""
Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: {"role": "user", "content": "..."}."""
Plain: TypeAlias = str | Sequence[int] | NDArray[np.integer[Any]]


def as_prompts(prompts: TextOrTokens | Iterable[TextOrTokens]) -> list[Plain]:
    """One prompt, or several, as a list of texts and rows; a tokenizer's output and a 2-D tensor hold several.

    Whether a row's numbers are token ids is not looked at. Raises InvalidArgumentError.

    >>> as_prompts("a text"), as_prompts([1, 2]), as_prompts({"input_ids": [[1, 2], [3]]})
    (['a text'], [[1, 2]], [[1, 2], [3]])
    """
    plain = _plain(prompts)
    is_one = isinstance(plain, str) or (len(plain) > 0 and isinstance(plain[0], int | np.integer))
    return [cast(Plain, plain)] if is_one else [as_prompt(each) for each in plain]


def as_prompt(prompt: TextOrTokens) -> Plain:
    """One prompt, as a text or a row; also the only one of a tokenizer's output or a 2-D tensor.

    Raises InvalidArgumentError for what is none, and for several.
    """
    plain = _plain(prompt)
    if isinstance(prompt, Mapping | Tensor) and len(plain) and isinstance(plain[0], list):
        if len(plain) > 1:
            raise InvalidArgumentError(f"one prompt is asked for, found {len(plain)}")
        plain = plain[0]
    return cast(Plain, plain)


def _plain(prompts: object) -> str | list[Any] | NDArray[Any]:
    """A text, or a list of whatever it holds; a row of numbers in an array stays one."""
    if isinstance(prompts, Mapping):
        return _unpadded(prompts)
    if isinstance(prompts, str | list) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
        return prompts
    if isinstance(prompts, Tensor | np.ndarray) and prompts.ndim in (1, 2):
        return cast(list[Any], prompts.tolist())
    if isinstance(prompts, Tensor | np.ndarray | bytes) or not isinstance(prompts, Iterable):
        # Bytes would pass as numbers. Values are not shown: they may be of a prompt.
        shape = f" of shape {tuple(prompts.shape)}" if isinstance(prompts, Tensor | np.ndarray) else ""
        raise InvalidArgumentError(f"a prompt is a text or a row of token ids, found {type(prompts).__name__}{shape}")
    return list(prompts)


def _unpadded(encoding: Mapping[str, Any]) -> list[Any]:
    """The `input_ids` of what a tokenizer returned, one row or several, without its padding."""
    if "input_ids" not in encoding:
        names = ", ".join(map(str, encoding))
        raise InvalidArgumentError(f"a prompt that is a mapping has input_ids, found one of {names:.80}")
    ids, mask = list(_plain(encoding["input_ids"])), encoding.get("attention_mask")
    if mask is None:
        return ids
    flags = list(_plain(mask))
    try:
        if ids and isinstance(ids[0], list):
            return [_chosen(row, row_flags) for row, row_flags in zip(ids, flags, strict=True)]
        return _chosen(ids, flags)
    except (TypeError, ValueError):
        raise InvalidArgumentError("input_ids and attention_mask of a prompt are not of the same form") from None


def _chosen(token_ids: list[int], flags: list[int]) -> list[int]:
    return [token_id for token_id, flag in zip(token_ids, flags, strict=True) if flag]


def as_conversations(conversations: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """One conversation, or several, as a list of conversations. Raises InvalidArgumentError."""
    if isinstance(conversations, str | Mapping) or not isinstance(conversations, Iterable):
        return [as_messages(cast(Any, conversations))]
    listed = list(conversations)
    is_one = not listed or isinstance(listed[0], Mapping)
    return [as_messages(cast(Any, each)) for each in ([listed] if is_one else listed)]


def as_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages of one conversation. Raises InvalidArgumentError unless there are some, and all are mappings."""
    is_several = isinstance(messages, Iterable) and not isinstance(messages, str | Mapping)
    listed: list[Any] = list(messages) if is_several else [messages]
    if not is_several or not listed or not all(isinstance(message, Mapping) for message in listed):
        found = ", ".join(sorted({type(message).__name__ for message in listed})) or "none"
        raise InvalidArgumentError(f'a conversation is messages {{"role": ..., "content": ...}}, found {found}')
    return listed
