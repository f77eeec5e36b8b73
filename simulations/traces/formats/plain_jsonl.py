"""Plain JSON Lines, what we write: `arrival_s`, `prompt_tokens`, `output_tokens`; if known `client`, `priority`, content.

`client` is a number in every row, or else a name in every row; `priority` is a number, 0 where a row has none. Content is
`hash_block_size` with either `hash_ids` (a list of prefix ids) or `hash_runs` (the same in run-length form,
`[[start, count], ...]`); one of the two in the whole file.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from pagedkv.simulations.traces.columns import (
    ColumnBuilder,
    agree_on_block_size,
    pack_runs,
    to_float64,
    to_int64,
)
from pagedkv.simulations.traces.json_blocks import JsonBlock, read_json
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.trace import Trace, number_names

__all__ = ["read_trace"]

_NUM_REQUIRED_KEYS: Final = 3


class _Row(msgspec.Struct):
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: int | str | UnsetType = UNSET
    priority: float | UnsetType = UNSET
    hash_ids: list[int] | UnsetType = UNSET
    hash_runs: list[tuple[int, int]] | UnsetType = UNSET
    hash_block_size: int | UnsetType = UNSET


def _count_keys(row: _Row) -> int:
    optional = (row.client, row.priority, row.hash_ids, row.hash_runs, row.hash_block_size)
    return _NUM_REQUIRED_KEYS + sum(value is not UNSET for value in optional)


def read_trace(source: TraceSource, *, session_gap_s: float) -> Trace:  # noqa: ARG001 - no sessions here
    """Read a plain JSON Lines trace; arrivals are taken as given, other keys ignored."""
    builder = ColumnBuilder(source)
    clients: list[int | str] = []
    content = _ContentReader(builder)
    for block in read_json(source, _Row, count_keys=_count_keys):
        first_line, rows = block.first_line, block.rows
        builder.add(
            first_line,
            to_float64([row.arrival_s for row in rows]),
            to_int64(source, first_line, "prompt_tokens", [row.prompt_tokens for row in rows]),
            to_int64(source, first_line, "output_tokens", [row.output_tokens for row in rows]),
        )
        builder.add_priorities(to_float64([0.0 if row.priority is UNSET else row.priority for row in rows]))
        _read_clients(source, block, clients)
        content.add(block)
    names = _add_clients(builder, clients)
    return builder.build(
        "jsonl", line_of=lambda request: request + 1, content_block_size=content.block_size, client_names=names
    )


class _ContentReader:
    """Adds the content of rows, in whichever of the two forms the file uses, and keeps its block size."""

    __slots__ = ("_builder", "_key", "block_size")

    def __init__(self, builder: ColumnBuilder) -> None:
        self._builder = builder
        self._key: str | None = None
        self.block_size: int | None = None

    def add(self, block: JsonBlock[_Row]) -> None:
        for line, row in enumerate(block.rows, start=block.first_line):
            if row.hash_ids is not UNSET or row.hash_runs is not UNSET:
                self._check(line, row)
        if self._key == "hash_ids":
            self._builder.add_content_ids(block.first_line, [row.hash_ids or () for row in block.rows])
        else:
            runs = [row.hash_runs or () for row in block.rows]
            self._builder.add_runs(*pack_runs(self._builder.source, block.first_line, runs))

    def _check(self, line: int, row: _Row) -> None:
        source = self._builder.source
        key = "hash_runs" if row.hash_ids is UNSET else "hash_ids"
        self._key = self._key or key
        if key != self._key or (row.hash_ids is not UNSET and row.hash_runs is not UNSET):
            raise source.error(line, "either `hash_ids` or `hash_runs` in the whole file", "both")
        if row.hash_block_size is UNSET:
            raise source.error(line, f"a key `hash_block_size` beside `{key}`", "none")
        self.block_size = agree_on_block_size(source, line, row.hash_block_size, self.block_size)


def _read_clients(source: TraceSource, block: JsonBlock[_Row], clients: list[int | str]) -> None:
    first = clients[0] if clients else block.rows[0].client if block.first_line == 1 else UNSET
    for line, row in enumerate(block.rows, start=block.first_line):
        if type(row.client) is not type(first):
            raise source.error(line, f"{_describe(first)}, as in line 1", _describe(row.client))
        if row.client is not UNSET:
            clients.append(row.client)


def _describe(client: int | str | UnsetType) -> str:
    return "no client" if client is UNSET else "a client's name" if isinstance(client, str) else "a client's number"


def _add_clients(builder: ColumnBuilder, clients: list[int | str]) -> tuple[str, ...]:
    strings = [client for client in clients if isinstance(client, str)]
    integers = [client for client in clients if isinstance(client, int)]
    if integers:
        builder.add_clients(to_int64(builder.source, 1, "client", integers))
    if not strings:
        return ()
    numbers, names = number_names(strings)
    builder.add_clients(numbers)
    return names
