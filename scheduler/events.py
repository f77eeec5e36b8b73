"""Everything that the scheduler decides, as values with a reason, delivered to a sink."""

from __future__ import annotations

import json
from typing import NamedTuple, Protocol, TextIO

__all__ = [
    "Aborted",
    "Added",
    "Admitted",
    "Deferred",
    "Event",
    "EventLog",
    "EventSink",
    "Finished",
    "Preempted",
    "Refused",
    "StepFailed",
]


class Added(NamedTuple):
    """A request joined the waiting queue; it will be `num_samples` samples once its prompt is computed."""

    time: float
    request_id: str
    num_prompt_tokens: int
    max_new_tokens: int
    num_samples: int = 1


class Refused(NamedTuple):
    """A request was refused at `add`: it could never fit, or too many wait. `reason` holds the arithmetic."""

    time: float
    request_id: str
    reason: str


class Deferred(NamedTuple):
    """A waiting request could not be admitted now; told once per change of the reason."""

    time: float
    step: int
    request_id: str
    reason: str


class Admitted(NamedTuple):
    """A request got a seat. `mode` says whether it is new, is computed anew after a preemption, or was swapped in."""

    time: float
    step: int
    request_id: str
    sample_idx: int
    mode: str
    num_known_tokens: int
    num_hit_tokens: int
    num_used_blocks: int


class Preempted(NamedTuple):
    """A running request lost its seat: its blocks, and those in use before and after; `num_needed_blocks` were short."""

    time: float
    step: int
    request_id: str
    sample_idx: int
    mode: str
    num_computed_tokens: int
    num_used_before: int
    num_used_after: int
    num_needed_blocks: int
    reason: str


class Finished(NamedTuple):
    """A sample of a request ended by itself."""

    time: float
    step: int
    request_id: str
    sample_idx: int
    reason: str
    num_output_tokens: int
    num_preemptions: int


class Aborted(NamedTuple):
    """A request was ended from outside, in the given state."""

    time: float
    request_id: str
    state: str


class StepFailed(NamedTuple):
    """The executor reported that a step was not carried out; its rows are planned again."""

    time: float
    step: int
    num_rows: int
    reason: str


Event = Added | Refused | Deferred | Admitted | Preempted | Finished | Aborted | StepFailed


class EventSink(Protocol):
    """Takes events as they happen. What it raises reaches the caller of the scheduler after the decision was made."""

    def emit(self, event: Event) -> None:
        """Take one event."""


class EventLog:
    """Writes events as JSON lines: same inputs, same bytes. Holds ids, counts and reasons, never tokens or salts."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def emit(self, event: Event) -> None:
        """Write one line."""
        line = {"event": type(event).__name__.lower(), **event._asdict()}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
