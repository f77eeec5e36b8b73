"""Plain CSV: `arrival_s,prompt_tokens,output_tokens`, and where known `client`, `priority`, `hash_ids`, `hash_block_size`.

`client` is a number in every record, or else a name in every record; `priority` is a number. `hash_ids` are prefix ids,
separated by single spaces; a record with ids names the tokens of a block in `hash_block_size`, the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from pagedkv.simulations.traces.columns import ColumnBuilder, agree_on_block_size, to_int64
from pagedkv.simulations.traces.csv_blocks import CsvBlock, read_csv
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace, number_names

__all__ = ["read_trace"]

_REQUIRED: Final = ("arrival_s", "prompt_tokens", "output_tokens")
_OPTIONAL: Final = ("client", "priority", "hash_ids", "hash_block_size")
_IDS: Final = re.compile(r"(?:[0-9]{1,40}(?: [0-9]{1,40})*)?")
# A number with a leading zero is a name: as an integer it would not come back as it was.
_WHOLE_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read a plain CSV trace; arrivals are taken as given, columns in any order, others ignored."""
    builder = ColumnBuilder(source)
    clients: list[str] = []
    block_size: int | None = None
    for block in read_csv(source, _REQUIRED, _OPTIONAL):
        builder.add(
            block.first_line,
            block.numbers("arrival_s"),
            block.integers("prompt_tokens"),
            block.integers("output_tokens"),
        )
        if "client" in block.cells:
            clients += _read_clients(block)
        if "priority" in block.cells:
            builder.add_priorities(block.numbers("priority"))
        if "hash_ids" in block.cells:
            block_size = _read_ids(builder, block, block_size)
    names = _add_clients(builder, clients) if clients else ()
    return builder.build("csv", line_of=lambda request: request + 2, content_block_size=block_size, client_names=names)


def _read_clients(block: CsvBlock) -> Sequence[str]:
    cells = block.cells["client"]
    if "" in cells:
        raise block.error(cells.index(""), "a client", "")
    return cells


def _add_clients(builder: ColumnBuilder, clients: list[str]) -> tuple[str, ...]:
    if all(map(_WHOLE_NUMBER.fullmatch, clients)):
        builder.add_clients(to_int64(builder.source, 2, "client", [int(client) for client in clients]))
        return ()
    numbers, names = number_names(clients)
    builder.add_clients(numbers)
    return names


def _read_ids(builder: ColumnBuilder, block: CsvBlock, block_size: int | None) -> int | None:
    sizes = block.cells.get("hash_block_size")
    if sizes is None:
        raise builder.source.error(1, "a column 'hash_block_size' beside 'hash_ids'", "none")
    ids: list[list[int]] = []
    for row, cell in enumerate(block.cells["hash_ids"]):
        if not _IDS.fullmatch(cell):
            raise block.error(row, "content ids separated by single spaces", cell)
        if cell:
            if not _WHOLE_NUMBER.fullmatch(sizes[row]):
                raise block.error(row, "a hash_block_size", sizes[row])
            block_size = agree_on_block_size(builder.source, block.first_line + row, int(sizes[row]), block_size)
        ids.append([int(part) for part in cell.split()])
    builder.add_content_ids(block.first_line, ids)
    return block_size
