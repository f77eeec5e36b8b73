"""Sound files made hostile: numbers replaced, lines disturbed, compressed bytes damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["broken_lines", "damaged", "with_number"]

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
MAX_PLACES = 40


def with_number(content: bytes, number: bytes) -> Iterator[bytes]:
    """The file with another number in the place of each of its numbers, one at a time; at most forty of them."""
    places = list(NUMBER.finditer(content))
    stride = max(1, len(places) // MAX_PLACES)
    for place in places[::stride]:
        yield content[: place.start()] + number + content[place.end() :]


def broken_lines(content: bytes) -> Iterator[bytes]:
    """The file with one line missing, repeated, cut, blank, foreign, or in the place of the next one."""
    lines = content.splitlines(keepends=True)
    for i, line in enumerate(lines):
        before, after = b"".join(lines[:i]), b"".join(lines[i + 1 :])
        replacements = (
            b"",
            line * 2,
            line[: len(line) // 2],
            b"\n",
            b"\r\n\r\n",
            b"{}\n",
            b"[]\n",
            b"a,b,c\n",
            b"\xff\xfe\n",
        )
        for other in (*replacements, line.rstrip(b"\r\n") + b",1\n", b'{"a":1,"a":2}\n', line.replace(b",", b";")):
            yield before + other + after
        if i + 1 < len(lines):
            yield before + lines[i + 1] + line + b"".join(lines[i + 2 :])


def damaged(packed: bytes) -> Iterator[bytes]:
    """A compressed file that ends too early, or holds a wrong byte, at up to forty places."""
    stride = max(1, len(packed) // MAX_PLACES)
    for place in range(2, len(packed), stride):
        yield packed[:place]
        yield packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :]
    yield packed + packed[:10]
