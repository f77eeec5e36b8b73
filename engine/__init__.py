"""A real engine on top: Hugging Face models served with continuous batching, on this project's cache, op and scheduler.

Names are loaded when they are first used, so that parts which need neither torch nor transformers stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.engine.async_llm import AsyncLLM
    from pagedkv.engine.beam_search import BeamSearchParams
    from pagedkv.engine.core import Engine
    from pagedkv.engine.errors import (
        ContextLengthError,
        EngineClosedError,
        MemoryBudgetError,
        ModelStepError,
        UnsupportedModelError,
    )
    from pagedkv.engine.llm import LLM
    from pagedkv.engine.outputs import BeamOutput, Completion, Piece, RequestOutput, RequestTimings
    from pagedkv.engine.sampling_params import SamplingParams
    from pagedkv.engine.speculation import DraftModelDrafter, NgramDrafter

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "RequestOutput",
    "Completion",
    "Piece",
    "RequestTimings",
    "BeamSearchParams",
    "BeamOutput",
    "NgramDrafter",
    "DraftModelDrafter",
    "Engine",
    "ContextLengthError",
    "EngineClosedError",
    "MemoryBudgetError",
    "ModelStepError",
    "UnsupportedModelError",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "Completion": "outputs",
    "Piece": "outputs",
    "RequestTimings": "outputs",
    "BeamSearchParams": "beam_search",
    "BeamOutput": "outputs",
    "NgramDrafter": "speculation",
    "DraftModelDrafter": "speculation",
    "Engine": "core",
    "ContextLengthError": "errors",
    "EngineClosedError": "errors",
    "MemoryBudgetError": "errors",
    "ModelStepError": "errors",
    "UnsupportedModelError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "tqdm", "transformers"):
            raise
        raise ModuleNotFoundError(
            f"pagedkv.engine.{name} needs the extra 'engine' ({error.name} is missing): "
            "in a checkout of pagedkv, pip install '.[engine]'",
            name=error.name,
        ) from None
