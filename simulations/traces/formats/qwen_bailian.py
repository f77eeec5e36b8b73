"""Qwen-Bailian: `chat_id`, `timestamp` (s), `input_length`, `output_length`, `hash_ids` of blocks of 16 tokens.

Source: alibaba-edu/qwen-bailian-usagetraces-anon. Its ids are salted hashes of single blocks, renumbered, so equal
ids need not mean equal prefixes; where they do not, the ids are replaced by prefix ids.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from pagedkv.simulations.traces.columns import ColumnBuilder, pack_ids, to_float64, to_int64
from pagedkv.simulations.traces.content import encode_runs, find_prefix_conflict, number_prefixes
from pagedkv.simulations.traces.json_blocks import read_json
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["BLOCK_SIZE", "read_trace"]

BLOCK_SIZE: Final = 16


class _Row(msgspec.Struct):
    chat_id: int
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    parent_chat_id: int | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET
    turn: int | msgspec.UnsetType = msgspec.UNSET


def _count_keys(row: _Row) -> int:
    return 5 + sum(value is not msgspec.UNSET for value in (row.parent_chat_id, row.type, row.turn))


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read a Qwen-Bailian trace; timestamps are taken as given, and the chat structure is ignored."""
    builder = ColumnBuilder(source)
    packed = []
    for block in read_json(source, _Row, count_keys=_count_keys):
        first_line, rows = block.first_line, block.rows
        builder.add(
            first_line,
            to_float64([row.timestamp for row in rows]),
            to_int64(source, first_line, "input_length", [row.input_length for row in rows]),
            to_int64(source, first_line, "output_length", [row.output_length for row in rows]),
        )
        packed.append(pack_ids(source, first_line, [row.hash_ids for row in rows]))
    ids = np.concatenate([part for part, _ in packed])
    lengths = np.concatenate([np.diff(offsets) for _, offsets in packed])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    runs = encode_runs(ids, offsets)
    if find_prefix_conflict(*runs) is not None and ids.min() >= 0:
        runs = encode_runs(number_prefixes(ids, offsets), offsets)
    builder.add_runs(*runs)
    return builder.build("qwen_bailian", line_of=lambda request: request + 1, content_block_size=BLOCK_SIZE)
