"""Everything that is changed of a user's model while the engine runs it, and put back after every step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from pagedkv.engine.model.bloom import bloom_forward, is_bloom_attention
from pagedkv.engine.model.few_rows import few_rows_forward, gains_from_few_rows

__all__ = ["AttentionFunction", "Patches", "keeps_latent"]

NAME = "pagedkv"
AttentionFunction = Callable[..., tuple[Tensor, None]]
_running = threading.local()
"""`function` is where the attention calls of this thread go."""


def _attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    function: AttentionFunction = _running.function
    return function(*args, **kwargs)


# Without a mask function of the same name: models then make no mask, and pass None.
AttentionInterface.register(NAME, _attention)


def keeps_latent(module: nn.Module) -> bool:
    """Whether this is an attention module that could cache a latent instead of keys and values (MLA)."""
    return callable(getattr(module, "expand_kv", None))


class Patches:
    """Attributes of a model, swapped in on entering and back on leaving; so the user's own calls see the model as it was.

    Attention calls of the thread that entered go to `attention`, which takes what transformers gives an attention
    function. Latent attention hands over its latent and rotary key, unexpanded. Linear layers on a CPU take few tokens
    another way. A few hundred nanoseconds per layer.
    """

    def __init__(self, model: nn.Module, attention: AttentionFunction) -> None:
        self._attention = attention
        self._swaps: list[tuple[dict[str, Any], str, Any]] = []
        configs: dict[int, Any] = {}
        for module in model.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                configs[id(config)] = config
            if is_bloom_attention(module):
                self._swaps.append((vars(module), "forward", bloom_forward(module, attention)))
            elif keeps_latent(module):
                self._swaps.append((vars(module), "expand_kv", _unexpanded))
            elif gains_from_few_rows(module):
                self._swaps.append((vars(module), "forward", few_rows_forward(module)))
        for config in configs.values():
            self._swaps.append((vars(config), "_attn_implementation_internal", NAME))
        self._restore: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        _running.function = self._attention
        for attributes, name, value in self._swaps:
            self._restore.append((attributes, name, attributes.get(name, _ABSENT)))
            attributes[name] = value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attributes, name, value in reversed(self._restore):
            if value is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = value
        self._restore.clear()
        del _running.function


_ABSENT = object()


def _unexpanded(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rotary
