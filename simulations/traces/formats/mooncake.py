"""Mooncake (FAST'25): `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens.

Source: kvcache-ai/Mooncake, `FAST25-release/traces`. `hash_ids` are prefix ids, one for each block, the last one of
which may be partial.
"""

from __future__ import annotations

from typing import Final

import msgspec

from pagedkv.simulations.traces.columns import ColumnBuilder, to_float64, to_int64
from pagedkv.simulations.traces.json_blocks import read_json
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace

__all__ = ["BLOCK_SIZE", "read_trace"]

BLOCK_SIZE: Final = 512


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read a Mooncake trace; timestamps become seconds and are not shifted."""
    builder = ColumnBuilder(source)
    for block in read_json(source, _Row, count_keys=lambda _: 4):
        first_line, rows = block.first_line, block.rows
        for row, fields in enumerate(rows):
            num_blocks = -(-fields.input_length // BLOCK_SIZE)
            if len(fields.hash_ids) != num_blocks:
                expected = f"{num_blocks} hash_ids for {fields.input_length} tokens in blocks of {BLOCK_SIZE}"
                raise source.error(first_line + row, expected, str(len(fields.hash_ids)))
        builder.add(
            first_line,
            to_float64([row.timestamp for row in rows]) / 1e3,
            to_int64(source, first_line, "input_length", [row.input_length for row in rows]),
            to_int64(source, first_line, "output_length", [row.output_length for row in rows]),
        )
        builder.add_content_ids(first_line, [row.hash_ids for row in rows])
    return builder.build("mooncake", line_of=lambda request: request + 1, content_block_size=BLOCK_SIZE)
