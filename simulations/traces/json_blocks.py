"""JSON Lines traces: one object on each physical line, decoded straight into typed rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from pagedkv.errors import TraceError
from pagedkv.simulations.traces.checks import excerpt, find_twin
from pagedkv.simulations.traces.source import TraceSource

__all__ = ["JsonBlock", "keys_of_first_line", "read_json"]

RowT = TypeVar("RowT", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class JsonBlock(Generic[RowT]):
    """Neighbouring rows; `first_line` is the physical line of the first one."""

    first_line: int
    rows: list[RowT]


def keys_of_first_line(source: TraceSource) -> list[str]:
    """Return the keys of the object in the first line; TraceError if it holds none."""
    return list(_decode(source, 1, source.first_line, msgspec.json.Decoder(dict[str, msgspec.Raw]).decode))


def read_json(
    source: TraceSource, row_type: type[RowT], *, count_keys: Callable[[RowT], int] | None = None
) -> Iterator[JsonBlock[RowT]]:
    """Yield the lines as typed rows; unknown keys are ignored, a key twice in one object is an error.

    msgspec keeps the last of two equal keys without a word, so each line is searched for them. `count_keys` tells how
    many keys a decoded row is known to have had: a line with just as many colons has each of them once and no other,
    which spares the search. TraceError for a line that is not JSON, a missing key, a wrong type (a float where an
    integer is due), or a number that does not fit.
    """
    decode = msgspec.json.Decoder(row_type).decode
    for batch in source.batches():
        rows = []
        try:
            for line in batch.lines:
                rows.append(decode(line))  # noqa: PERF401 - on an error, the length tells the line
        except (msgspec.MsgspecError, RecursionError):
            number = batch.first_line + len(rows)
            _decode(source, number, batch.lines[len(rows)], decode)
            raise
        for number, (row, line) in enumerate(zip(rows, batch.lines, strict=True), start=batch.first_line):
            if count_keys is None or line.count(":") != count_keys(row):
                _check_unique_keys(source, number, line)
        yield JsonBlock(batch.first_line, rows)


def _decode(source: TraceSource, number: int, line: str, decode: Callable[[str], Any]) -> Any:
    try:
        return decode(line)
    except msgspec.ValidationError as error:
        expected, found = _describe(str(error))
        raise source.error(number, expected, found) from None
    except msgspec.DecodeError as error:
        raise source.error(number, f"a JSON object ({error})", excerpt(line)) from None
    except RecursionError:
        raise source.error(number, "JSON of moderate depth", excerpt(line)) from None


def _describe(message: str) -> tuple[str, str]:
    """Split a message of msgspec, `Expected X, got Y - at $.path`, into what was expected and found."""
    problem, _, path = message.partition(" - at ")
    where = f" at {path}" if path else ""
    if problem.startswith("Expected ") and ", got " in problem:
        expected, _, found = problem.removeprefix("Expected ").partition(", got ")
        return f"{expected}{where}", found
    if problem.startswith("Object missing required field "):
        return f"a key {problem.removeprefix('Object missing required field ')}{where}", "none"
    if problem.startswith("Expected "):
        return f"{problem.removeprefix('Expected ')}{where}", "something else"
    return f"a valid value{where}", problem.lower()


def _check_unique_keys(source: TraceSource, number: int, line: str) -> None:
    def refuse_twins(pairs: list[tuple[str, object]]) -> None:
        twin = find_twin([key for key, _ in pairs])
        if twin is not None:
            raise source.error(number, "each key once", f"key {excerpt(twin)} twice")

    try:
        # Numbers stay text: only keys matter here, and int() refuses more than 4,300 digits.
        json.loads(line, object_pairs_hook=refuse_twins, parse_int=str, parse_float=str)
    except TraceError:
        raise
    except (ValueError, RecursionError):
        raise source.error(number, "a JSON object", excerpt(line)) from None
