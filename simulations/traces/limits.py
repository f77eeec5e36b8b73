"""Bounds on what a trace may hold, applied before memory is taken: a bad file costs an error, not a machine."""

from __future__ import annotations

from typing import Final

__all__ = [
    "MAX_ARRIVAL_S",
    "MAX_CONTENT_BLOCK_SIZE",
    "MAX_CONTENT_ID",
    "MAX_DECOMPRESSED_BYTES",
    "MAX_LINE_BYTES",
    "MAX_REQUESTS",
    "MAX_TOKENS",
]

MAX_REQUESTS: Final = 10_000_000
"""Requests in one trace. The largest public one (BurstGPT) has 5.34 million."""

MAX_TOKENS: Final = 2**24
"""Prompt tokens, and output tokens, of one request: sixteen times the longest context served today."""

MAX_ARRIVAL_S: Final = 1e9
"""Seconds from the start of the trace: 31 years, and still exact to 0.2 µs in float64."""

MAX_CONTENT_ID: Final = 2**62 - 1
"""The largest content id. One spare bit below int64 keeps `start + count` from overflowing."""

MAX_CONTENT_BLOCK_SIZE: Final = MAX_TOKENS
"""Tokens that one content id names."""

MAX_LINE_BYTES: Final = 64 * 2**20
"""One physical line."""

MAX_DECOMPRESSED_BYTES: Final = 4 * 2**30
"""One file after decompression: a bomb of 4 MB can hold that much."""
