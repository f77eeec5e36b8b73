"""A file in Chrome's trace event format that is read even when its end is missing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TextIO

__all__ = ["TraceFile"]

MAX_PENDING_CHARS = 2**16
MAX_PENDING_NS = 10**9


class TraceFile:
    """Takes events as lines of JSON and writes them as one array, a batch of whole events at a time.

    An array that lacks its closing bracket still loads in the viewers, so nothing but the last second is lost when the
    process dies. At most 64 KiB wait in memory.
    """

    __slots__ = ("_file", "_flushed_ns", "_lines", "_num_chars", "_owns_file", "_separator")

    def __init__(self, file: TextIO | str | Path) -> None:
        self._owns_file = isinstance(file, str | Path)
        if isinstance(file, str | Path):
            file = Path(file).open("w", encoding="ascii", newline="\n")  # noqa: SIM115 - it stays open until `close`
        self._file: TextIO | None = file
        self._separator = "[\n"
        self._lines: list[str] = []
        self._num_chars = 0
        self._flushed_ns = 0

    @property
    def is_open(self) -> bool:
        """Whether it takes events."""
        return self._file is not None

    def write(self, line: str) -> None:
        """Take one event, or several with a comma between them. O(1) amortised."""
        self._lines.append(line)
        self._num_chars += len(line)
        if self._num_chars > MAX_PENDING_CHARS:
            self.flush()

    def flush_if_old(self, now_ns: int) -> None:
        """Flush about once a second. `now_ns` is the time of the last event, in whole nanoseconds."""
        if now_ns - self._flushed_ns > MAX_PENDING_NS:
            self._flushed_ns = now_ns
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._file is not None and self._lines:
            self._file.write(self._separator + ",\n".join(self._lines))
            self._file.flush()
            self._separator = ",\n"
            self._lines.clear()
            self._num_chars = 0

    def close(self) -> None:
        """Complete the array; a file that was passed open stays open. Twice is once."""
        if self._file is None:
            return
        self.flush()
        self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.flush()
        if self._owns_file:
            self._file.close()
        self._file = None

    def abandon(self) -> None:
        """Let go of the file as it is, after an error: nothing more comes, and what that raises says nothing new."""
        if self._file is not None and self._owns_file:
            with suppress(OSError):
                self._file.close()
        self._file = None
