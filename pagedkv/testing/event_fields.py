"""What each event of a log consists of: fields, their types, and the words and numbers that they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import FinishReason, PreemptionMode
from pagedkv.scheduler.sample import SampleState

__all__ = ["COUNTS", "checked_kind"]

# Event -> its fields, each with the types that JSON may bring.
NUMBER = (int, float)
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "added": {"time": NUMBER, "request_id": str, "num_prompt_tokens": int, "max_new_tokens": int},
    "refused": {"time": NUMBER, "request_id": str, "reason": str},
    "deferred": {"time": NUMBER, "step": int, "request_id": str, "reason": str},
    "admitted": {
        "time": NUMBER,
        "step": int,
        "request_id": str,
        "sample_idx": int,
        "mode": str,
        "num_known_tokens": int,
        "num_hit_tokens": int,
        "num_used_blocks": int,
    },
    "preempted": {
        "time": NUMBER,
        "step": int,
        "request_id": str,
        "sample_idx": int,
        "mode": str,
        "num_computed_tokens": int,
        "num_used_before": int,
        "num_used_after": int,
        "num_needed_blocks": int,
    },
    "finished": {
        "time": NUMBER,
        "step": int,
        "request_id": str,
        "sample_idx": int,
        "reason": str,
        "num_output_tokens": int,
        "num_preemptions": int,
    },
    "aborted": {"time": NUMBER, "request_id": str, "state": str},
    "stepfailed": {"time": NUMBER, "step": int, "num_rows": int, "reason": str},
}
OPTIONAL: dict[str, dict[str, type | tuple[type, ...]]] = {"added": {"num_samples": int}, "preempted": {"reason": str}}
COUNTS = {kind: [name for name, types in fields.items() if types is int] for kind, fields in FIELDS.items()}
"""Event -> its fields that count something, from 0 on."""
WORDS: dict[tuple[str, str], frozenset[str]] = {
    ("admitted", "mode"): frozenset({"new", "recomputed", "swapped in"}),
    ("preempted", "mode"): frozenset(PreemptionMode),
    ("finished", "reason"): frozenset(FinishReason) - {FinishReason.ABORT},
    ("aborted", "state"): frozenset(SampleState) - {SampleState.FINISHED},
}
CHECKS = {
    kind: [
        (name, types, WORDS.get((kind, name), frozenset())) for name, types in (fields | OPTIONAL.get(kind, {})).items()
    ]
    for kind, fields in FIELDS.items()
}
"""Event -> for each field its name, its types, and the words that it may hold; any, if there are none."""


def checked_kind(record: Mapping[str, Any], number: int) -> str:
    """The kind of an event, once its fields are found to be there and of their types. O(1).

    Raises InvalidArgumentError with the event's number for what is no event.
    """
    kind = record.get("event")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InvalidArgumentError(f"event {number}: expected one of {', '.join(FIELDS)}, found {str(kind)[:60]!r}")
    for name, types, words in CHECKS[kind]:
        value = record.get(name)
        if name not in record and name in OPTIONAL.get(kind, ()):
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            raise InvalidArgumentError(f"event {number}: expected {name} in {kind!r}, found {str(value)[:60]!r}")
        if isinstance(value, float) and not isfinite(value):
            raise InvalidArgumentError(f"event {number}: expected a finite {name} in {kind!r}, found {value}")
        if words and value not in words:
            expected = ", ".join(sorted(words))
            raise InvalidArgumentError(
                f"event {number}: {name} of {kind!r} is {str(value)[:60]!r}, expected one of {expected}"
            )
    return kind
