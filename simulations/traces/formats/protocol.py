"""What a trace format is: a name, the fields that give it away, and a reader in a module of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["TRACE_FORMATS", "TraceFormat", "TraceReader"]


class TraceReader(Protocol):
    """Reads a whole source into a trace, or raises TraceError. Every format module offers one as `read_trace`."""

    def __call__(self, source: TraceSource, *, session_gap_s: float) -> Trace:
        """Read `source`; `session_gap_s` is 0 but for formats that hold sessions."""


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A format, recognised by the columns of its header or the keys of its first object, never by a file's name.

    `module` names the module in this package that reads it.
    """

    name: str
    kind: Literal["csv", "json"]
    fields: tuple[str, ...]
    summary: str
    module: str
    has_sessions: bool = False


TRACE_FORMATS: Final[tuple[TraceFormat, ...]] = (
    TraceFormat(
        "azure",
        "csv",
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        "Azure LLM inference traces, 2023 and 2024",
        "azure",
    ),
    TraceFormat(
        "burstgpt", "csv", ("Timestamp", "Request tokens", "Response tokens"), "BurstGPT, versions 1 and 2", "burstgpt"
    ),
    TraceFormat(
        "csv",
        "csv",
        ("arrival_s", "prompt_tokens", "output_tokens"),
        "plain columns, clients and ids optional",
        "plain_csv",
    ),
    TraceFormat(
        "jsonl",
        "json",
        ("arrival_s", "prompt_tokens", "output_tokens"),
        "plain objects, what `convert` writes",
        "plain_jsonl",
    ),
    TraceFormat(
        "agentic", "json", ("block_size", "requests"), "sessions of coding agents", "agentic", has_sessions=True
    ),
    # Before mooncake, whose keys are a part of these.
    TraceFormat(
        "qwen_bailian",
        "json",
        ("chat_id", "timestamp", "input_length", "output_length", "hash_ids"),
        "Qwen-Bailian usage traces, blocks of 16 tokens",
        "qwen_bailian",
    ),
    TraceFormat(
        "mooncake",
        "json",
        ("timestamp", "input_length", "output_length", "hash_ids"),
        "Mooncake (FAST'25), blocks of 512 tokens",
        "mooncake",
    ),
)
"""The formats known, in the order in which they are tried."""
