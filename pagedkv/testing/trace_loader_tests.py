"""`TraceLoaderTests`: whatever a trace file holds, the loader gives a sound trace or an error of its own kind."""

from __future__ import annotations

import gzip
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from pagedkv.errors import TraceError
from pagedkv.testing.hostile_files import broken_lines, damaged, with_number

__all__ = ["TraceLoaderTests"]

NUMBERS = (
    "NaN", "nan", "Infinity", "-Infinity", "inf", "-1", "-0", "0.5", "1e30", "1e400", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1180591620717411303424", "0x10", "1_000", "٣", "", "null", "true",
    '"7"', "[]", "{}", '"x"', "9" * 5000,
)  # fmt: skip
"""What takes the place of each number of a sound file: among them 2^63 - 1, 2^63, 2^64 and 2^70."""


class TraceLoaderTests:
    """Subclass it, and supply `load` and `examples`; each test feeds the loader what a file may hold by malice or accident.

    class TestMine(TraceLoaderTests):
        examples = (Path("a_small_sound_trace.csv").read_bytes(),)

        def load(self, path):
            return load_trace(path)

    `examples` are sound files in each of the loader's formats, several records each. `errors` are what it may raise, none
    of which may span several lines. What is loaded goes to `check`, and to `describe` to be compared.
    """

    examples: ClassVar[tuple[bytes, ...]] = ()
    errors: ClassVar[tuple[type[Exception], ...]] = (TraceError,)
    max_memory_bytes: ClassVar[int] = 64 * 2**20
    """What reading a hostile file of less than 2 MB may take, beyond what was taken before."""

    def load(self, path: Path) -> object:
        """Read a trace file."""
        raise NotImplementedError("subclass TraceLoaderTests and supply load and examples")

    def check(self, trace: object) -> None:
        """Raise if a trace that was loaded is not sound. By default nothing is known of it."""

    def describe(self, trace: object) -> object:
        """What two equal traces have in common; by default their repr."""
        return repr(trace)

    def capped(self, num_bytes: int) -> AbstractContextManager[object] | None:
        """Lower the cap on decompressed bytes meanwhile; None, the default: the loader reads no compressed files."""
        del num_bytes
        return None

    def attempt(self, path: Path, content: bytes) -> object | None:
        """Load this content: a sound trace, or None if the loader refused it with an error of its own kind."""
        path.write_bytes(content)
        try:
            trace = self.load(path)
        except self.errors as error:
            message = str(error)
            assert message, "an error without a message"  # noqa: S101 - a test
            assert "\n" not in message, f"an error of several lines: {message!r}"  # noqa: S101
            assert len(message) < 1000 + len(str(path)), f"an error of {len(message)} characters"  # noqa: S101
            return None
        self.check(trace)
        return trace

    def each_example(self) -> Iterator[bytes]:
        """The examples; there must be some."""
        if not self.examples:
            raise NotImplementedError("supply examples: sound files in each of the loader's formats")
        yield from self.examples

    def test_examples_are_loaded(self, tmp_path: Path) -> None:
        """Each example is a sound trace, twice the same."""
        for content in self.each_example():
            first, second = (self.attempt(tmp_path / "trace", content) for _ in range(2))
            assert first is not None  # noqa: S101
            assert second is not None  # noqa: S101
            assert self.describe(first) == self.describe(second)  # noqa: S101

    @pytest.mark.parametrize("number", NUMBERS, ids=[number[:24] or "nothing" for number in NUMBERS])
    def test_any_number_may_be_something_else(self, number: str, tmp_path: Path) -> None:
        """NaN, infinities, negative and huge numbers, and what is no number, in the place of each number in turn."""
        for content in self.each_example():
            for mutant in with_number(content, number.encode()):
                self.attempt(tmp_path / "trace", mutant)

    def test_lines_may_be_anything(self, tmp_path: Path) -> None:
        """Lines that are missing, repeated, cut, swapped (so that the clock goes backwards), blank or of another file."""
        for content in self.each_example():
            for mutant in broken_lines(content):
                self.attempt(tmp_path / "trace", mutant)

    def test_nesting_may_be_deep(self, tmp_path: Path) -> None:
        """A hundred thousand brackets, alone and in the place of each number."""
        for opening in (b"[", b'{"a":'):
            deep = opening * 100_000
            self.attempt(tmp_path / "trace", deep)
            for content in self.each_example():
                mutants = with_number(content, deep)
                self.attempt(tmp_path / "trace", next(iter(mutants), deep))

    def test_a_byte_order_mark_and_crlf_change_nothing_or_are_refused(self, tmp_path: Path) -> None:
        """What Windows adds to a file is not data."""
        for content in self.each_example():
            plain = self.attempt(tmp_path / "trace", content)
            for variant in (b"\xef\xbb\xbf" + content, re.sub(rb"\r?\n", b"\r\n", content)):
                trace = self.attempt(tmp_path / "trace", variant)
                assert trace is None or self.describe_content(trace) == self.describe_content(plain)  # noqa: S101

    def describe_content(self, trace: object) -> object:
        """What is left of `describe` when the file's bytes differ and the records do not; by default the same."""
        return self.describe(trace)

    def test_no_file_may_be_an_error_of_another_kind(self, tmp_path: Path) -> None:
        """Nothing there, a folder, nothing in it, zeros, random bytes, other encodings."""
        for path in (tmp_path / "nothing", tmp_path):
            with pytest.raises(self.errors):
                self.load(path)
        for content in (b"", b"\n", b"\0" * 4096, bytes(range(256)) * 16, "arrival_s".encode("utf-16"), b"\x1f\x8b"):
            assert self.attempt(tmp_path / "trace", content) is None  # noqa: S101

    def test_damaged_compressed_files_are_refused(self, tmp_path: Path) -> None:
        """Cut at each of many places, or with bytes changed; what still decompresses may be a trace."""
        for content in self.each_example():
            packed = gzip.compress(content, mtime=0)
            for mutant in damaged(packed):
                self.attempt(tmp_path / "trace", mutant)
            assert self.attempt(tmp_path / "trace", packed[:-4]) is None  # noqa: S101

    def test_a_decompression_bomb_is_refused_before_it_goes_off(self, tmp_path: Path) -> None:
        """A file that decompresses to more than the cap, in bounded memory."""
        cap = 2**19
        for content in self.each_example():
            context = self.capped(cap)
            if context is None:
                pytest.skip("this loader reads no compressed files")
            first, *others = content.splitlines(keepends=True)
            line = others[-1] if others else first
            bomb = gzip.compress(first + line * (4 * cap // len(line)), 1, mtime=0)
            with context:
                assert self.bounded(tmp_path / "trace", bomb) is None  # noqa: S101

    def test_one_endless_line_takes_bounded_memory(self, tmp_path: Path) -> None:
        """A line of a megabyte, in the middle of the file."""
        for content in self.each_example():
            self.bounded(tmp_path / "trace", content + b"7" * 2**20)

    def bounded(self, path: Path, content: bytes) -> object | None:
        """As `attempt`, in no more than `max_memory_bytes`."""
        tracemalloc.start()
        try:
            trace = self.attempt(path, content)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < self.max_memory_bytes, f"reading {len(content)} bytes took {peak / 2**20:.0f} MiB"  # noqa: S101
        return trace
