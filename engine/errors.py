"""What the engine refuses: a model that it cannot serve, and memory that does not hold what was asked for."""

from __future__ import annotations

from pagedkv.errors import ConfigError, InvalidArgumentError, PagedKVError

__all__ = ["ContextLengthError", "EngineClosedError", "MemoryBudgetError", "ModelStepError", "UnsupportedModelError"]


class UnsupportedModelError(InvalidArgumentError):
    """A model that cannot be served through block tables; the message names it and the reason. It was not changed."""

    def __init__(self, model_name: str, reason: str) -> None:
        super().__init__(f"{model_name} cannot be served: {reason}")
        self.model_name = model_name
        self.reason = reason


class ContextLengthError(InvalidArgumentError):
    """A prompt and the new tokens asked for exceed the model's positions."""


class MemoryBudgetError(ConfigError):
    """The memory that was granted does not hold the model's K/V; the message holds the arithmetic."""


class ModelStepError(PagedKVError, RuntimeError):
    """The model raised while it computed this request's tokens; the cause is attached. Other requests go on."""


class EngineClosedError(PagedKVError, RuntimeError):
    """The engine was closed, or an AsyncLLM has taken it over: it takes no requests any more."""
