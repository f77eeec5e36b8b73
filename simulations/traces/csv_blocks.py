"""CSV traces: a header, then one record for each physical line. Cells become typed columns, or a TraceError."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces.checks import excerpt, find_twin
from pagedkv.simulations.traces.columns import to_float64, to_int64
from pagedkv.simulations.traces.source import TraceSource

__all__ = ["CsvBlock", "parse_header", "read_csv"]

# Python's int() and float() take more than a trace should hold: underscores, spaces, Arabic digits, "nan", "infinity".
_INTEGER: Final = re.compile(r"-?[0-9]{1,40}")
_NUMBER: Final = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class CsvBlock:
    """Neighbouring records as columns of text; `first_line` is the physical line of the first one."""

    source: TraceSource
    first_line: int
    cells: dict[str, Sequence[str]]

    def integers(self, column: str) -> npt.NDArray[np.int64]:
        """Return a column of plain decimal integers; TraceError at the first cell that is not one."""
        matches = _INTEGER.fullmatch
        values = [int(cell) if matches(cell) else self._refuse(row, column, cell) for row, cell in self._rows(column)]
        return to_int64(self.source, self.first_line, column, values)

    def numbers(self, column: str) -> npt.NDArray[np.float64]:
        """Return a column of plain decimal numbers as float64; TraceError at the first cell that is not one."""
        matches = _NUMBER.fullmatch
        values = [
            float(cell) if matches(cell) else self._refuse(row, column, cell, "a number")
            for row, cell in self._rows(column)
        ]
        return to_float64(values)

    def error(self, row: int, expected: str, cell: str) -> Exception:
        """Make the error about one cell of record `row` of this block."""
        return self.source.error(self.first_line + row, expected, excerpt(cell))

    def _rows(self, column: str) -> Iterator[tuple[int, str]]:
        return enumerate(self.cells[column])

    def _refuse(self, row: int, column: str, cell: str, kind: str = "an integer") -> int:
        raise self.error(row, f"{kind} in column {column!r}", cell)


def parse_header(source: TraceSource) -> list[str]:
    """Return the column names in the first line; TraceError if it is not CSV or names a column twice."""
    [header] = _parse(source, 1, [source.first_line])
    twin = find_twin(header)
    if twin is not None:
        raise source.error(1, "each column once", f"column {excerpt(twin)} twice")
    return header


def read_csv(source: TraceSource, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[CsvBlock]:
    """Yield the records as blocks that hold the wanted columns; other columns are ignored.

    TraceError for a missing column, a record with too few or too many fields, or broken quoting. A quoted field cannot
    contain a line break: a record is one physical line. Python's csv module bounds a field to 131,072 characters.
    """
    header = parse_header(source)
    for column in required:
        if column not in header:
            raise source.error(1, f"a column {column!r}", f"the columns {excerpt(', '.join(header))}")
    wanted = {column: header.index(column) for column in (*required, *optional) if column in header}
    for batch in source.batches():
        is_first = batch.first_line == 1
        lines = batch.lines[1:] if is_first else batch.lines
        first_line = batch.first_line + is_first
        if not lines:
            continue
        rows = _parse(source, first_line, lines)
        num_fields = len(header)
        for row, fields in enumerate(rows):
            if len(fields) != num_fields:
                raise source.error(first_line + row, f"{num_fields} fields", str(len(fields)))
        columns = list(zip(*rows, strict=True))
        yield CsvBlock(source, first_line, {column: columns[index] for column, index in wanted.items()})


def _parse(source: TraceSource, first_line: int, lines: list[str]) -> list[list[str]]:
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error:
        rows = []
    if len(rows) == len(lines):
        return rows
    # A quote was left open, or worse: read line by line to find where.
    for row, line in enumerate(lines):
        try:
            next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise source.error(first_line + row, "a CSV record on one line", str(error).partition(" - ")[0]) from None
    raise source.error(first_line, "CSV records, one on each line", f"{len(rows)} records on {len(lines)} lines")
