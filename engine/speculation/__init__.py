"""Speculative decoding: who guesses the next tokens, and which guesses came true.

The drafter with a model of its own is loaded when it is first used: it builds on parts of the engine that themselves
know what a drafter is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pagedkv.engine.speculation.drafter import Drafter, SampleKey
from pagedkv.engine.speculation.ngram import NgramDrafter
from pagedkv.engine.speculation.row_drafts import RowDrafts
from pagedkv.engine.speculation.verification import Accepted, accept_drafts, positions_of

if TYPE_CHECKING:
    from pagedkv.engine.speculation.draft_model import DraftModelDrafter

__all__ = [
    "Drafter",
    "SampleKey",
    "NgramDrafter",
    "DraftModelDrafter",
    "RowDrafts",
    "Accepted",
    "accept_drafts",
    "positions_of",
]


def __getattr__(name: str) -> Any:
    if name != "DraftModelDrafter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.draft_model").DraftModelDrafter
