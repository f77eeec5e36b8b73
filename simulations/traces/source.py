"""The physical lines of a trace file: opened, decompressed, bounded, hashed and numbered, in one pass."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from pagedkv.errors import TraceError
from pagedkv.simulations.file_errors import describe_os_error
from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.checks import excerpt

__all__ = ["LineBatch", "TraceSource"]

_CHUNK_BYTES: Final = 2**20
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BYTE_ORDER_MARK: Final = "\ufeff"


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Neighbouring lines without their line ends; `first_line` is the number of the first one, counted from 1."""

    first_line: int
    lines: list[str]


class TraceSource:
    """A trace file, plain or gzip (told by its first two bytes), read once as UTF-8 lines.

    Line ends are LF or CRLF. A byte order mark is skipped. Blank lines may only end the file. All errors are
    TraceErrors of one line, `path:line: expected X, found Y`; those about the file as a whole have no line number.
    """

    __slots__ = ("_batches", "_digest", "_pending", "name", "path")

    def __init__(self, path: str | Path) -> None:
        self.path = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(path))
        self.name = _name_of(Path(path))
        self._digest = hashlib.sha256()
        self._batches = self._read(Path(path))
        self._pending = next(self._batches)

    @property
    def first_line(self) -> str:
        """The first line: a header, or the first record. There is one, since an empty file is an error."""
        return self._pending.lines[0]

    @property
    def digest(self) -> str:
        """SHA-256 of the decompressed bytes read so far; of the file once `batches` is exhausted."""
        return self._digest.hexdigest()

    def batches(self) -> Iterator[LineBatch]:
        """Yield the lines of the file, about a mebibyte at a time. Call it once."""
        yield self._pending
        yield from self._batches

    def error(self, line: int | None, expected: str, found: str) -> TraceError:
        """Make the error to raise; `found` comes from `excerpt`, or is short by nature."""
        where = self.path if line is None else f"{self.path}:{line}"
        return TraceError(f"{where}: expected {expected}, found {found}")

    def _read(self, path: Path) -> Iterator[LineBatch]:
        next_line, carry = 1, b""
        blank_line: int | None = None
        has_lines = False
        try:
            with path.open("rb") as file:
                for chunk in self._chunks(file):
                    block, newline, rest = (carry + chunk).rpartition(b"\n") if chunk else (carry, b"", b"")
                    if len(rest) > limits.MAX_LINE_BYTES:
                        raise self.error(next_line, f"a line of at most {limits.MAX_LINE_BYTES} bytes", "a longer one")
                    carry = rest
                    if not block and not newline:
                        continue
                    lines = self._decode(block, next_line)
                    filled, blank = _split_at_blank(lines)
                    if filled and blank_line is not None:
                        raise self._blank_error(blank_line)
                    if filled:
                        has_lines = True
                        yield LineBatch(next_line, filled)
                    if blank is not None and blank_line is None:
                        blank_line = next_line + blank
                        if any(line.strip() for line in lines[blank:]):
                            raise self._blank_error(blank_line)
                    next_line += len(lines)
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                raise self.error(next_line, "gzip data", excerpt(str(error))) from None
            raise self.error(None, "a readable file", describe_os_error(error)) from None
        except (EOFError, zlib.error):
            raise self.error(next_line, "a complete gzip stream", "a truncated or damaged one") from None
        if not has_lines:
            raise self.error(1, "a header or a record", "an empty file")

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield decompressed chunks, hashed and counted; an empty one marks the end."""
        is_gzip = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        stream = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if is_gzip else file
        num_bytes = 0
        while chunk := stream.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > limits.MAX_DECOMPRESSED_BYTES:
                raise self.error(None, f"at most {limits.MAX_DECOMPRESSED_BYTES} decompressed bytes", "more")
            self._digest.update(chunk)
            yield chunk
        yield b""

    def _decode(self, block: bytes, first_line: int) -> list[str]:
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            line = first_line + block.count(b"\n", 0, error.start)
            raise self.error(line, "UTF-8 text, plain or gzip", f"byte 0x{block[error.start]:02x}") from None
        if first_line == 1:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        lines = text.split("\n")
        return [line.removesuffix("\r") for line in lines] if "\r" in text else lines

    def _blank_error(self, line: int) -> TraceError:
        return self.error(line, "a record (blank lines may only end the file)", "a blank line")


def _split_at_blank(lines: list[str]) -> tuple[list[str], int | None]:
    """Return the lines before the first blank one, and its index, if there is one."""
    if all(lines) and not any(map(str.isspace, lines)):
        return lines, None
    blank = next(index for index, line in enumerate(lines) if not line.strip())
    return lines[:blank], blank


def _name_of(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")
