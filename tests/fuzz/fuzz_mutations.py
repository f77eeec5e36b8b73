"""A small mutation fuzzer: seeded, in plain Python, for machines without atheris and for the quick run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

__all__ = ["mutants"]

NUMBERS = (  # noqa: SIM905 - a list of this many would take a line each
    "0 1 -1 2 3 16 255 1023 1024 1025 65535 65536 65537 16777217 67108865 268435457 2147483647 2147483648 4294967296 "
    "4611686018427387904 9223372036854775807 9223372036854775808 1180591620717411303424 -9223372036854775809 0.5 -0.0 1e308 "
    "1e309 1e-400 NaN Infinity -Infinity 007 0x10"
).split()
TEXTS = ('""', "null", "true", "false", "[]", "{}", "[[]]", '"a"', '"\\ud800"', '"\\u0000"', "[[[[[[[[[[[[", "{" * 50)
PIECES = [piece.encode() for piece in (*NUMBERS, *TEXTS)]
PIECES += [
    b"9" * 400,
    b"9" * 5000,
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"\n",
    b"\n\n",
    b",",
    b":",
    b'"',
    b"'",
]
PIECES += [b"\x1f\x8b\x08\x00", b"[" * 2000, b"\xed\xa0\x80", b" " * 300]
TOKEN = re.compile(rb'"[^"\n]{0,80}"|-?[0-9.]{1,40}|true|false|null|[\[\]{}:,\n]')


def mutants(seeds: list[bytes], random: Random) -> Iterator[bytes]:
    """Yield inputs without end: the seeds first, then mutants of them, the same ones for the same `random`."""
    yield from seeds
    while True:
        data = random.choice(seeds)
        for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
            data = change(data, seeds, random)
        yield data


def change(data: bytes, seeds: list[bytes], random: Random) -> bytes:
    """Change one place: a token becomes another, bytes come, go, flip or stand twice, or two inputs are crossed."""
    kind = random.randrange(9)
    tokens = [match.span() for match in TOKEN.finditer(data)] if kind < 5 else []
    if tokens:
        begin, end = random.choice(tokens)
        if kind == 4:  # Another token of the same input, so that types change but all stays well-formed.
            first, last = random.choice(tokens)
            return data[:begin] + data[first:last] + data[end:]
        return data[:begin] + random.choice(PIECES) + data[end:]
    begin = random.randrange(len(data) + 1)
    end = min(len(data), begin + random.choice((1, 1, 2, 4, 16, 64)))
    if kind == 5:
        return data[:begin] + data[end:]
    if kind == 6:
        return data[:end] + data[begin:]
    if kind == 7:
        other = random.choice(seeds)
        return data[:begin] + other[random.randrange(len(other) + 1) :]
    flipped = bytes(byte ^ (1 << random.randrange(8)) for byte in data[begin:end])
    return data[:begin] + flipped + data[end:]
