"""Write a trace as plain JSON Lines, the format that holds all a trace knows; reading it back gives an equal trace."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.file_errors import about

if TYPE_CHECKING:
    from pagedkv.simulations.traces.trace import Trace

__all__ = ["digest_of", "write_trace"]

_ROWS_PER_CHUNK: Final = 4096


def write_trace(trace: Trace, path: str | Path) -> str:
    """Write `trace` to a file `*.jsonl`, or compressed to `*.jsonl.gz`, and return the digest of the plain bytes.

    The same trace gives the same bytes: keys in a fixed order, the shortest decimals that read back as the same
    floats, and no time stamp or name in the gzip header (compressed bytes also depend on the zlib in use). The file
    appears whole or not at all. Content ids are written as runs. O(n + num_runs).

    Raises InvalidArgumentError for another suffix, and OSError where the file cannot be written.
    """
    target = Path(path)
    if not target.name.endswith((".jsonl", ".jsonl.gz")):
        raise InvalidArgumentError(f"path: expected a name ending in .jsonl or .jsonl.gz, found {target.name!r}")
    digest = hashlib.sha256()
    partial = target.with_name(f"{target.name}.part")
    try:
        with partial.open("wb") as file:
            is_gzip = target.name.endswith(".gz")
            stream = cast("IO[bytes]", gzip.GzipFile("", "wb", 9, file, mtime=0)) if is_gzip else file
            for chunk in _encode(trace):
                digest.update(chunk)
                stream.write(chunk)
            if is_gzip:
                stream.close()
        partial.replace(target)
    except OSError as error:  # Of the file that was asked for, not of the part that goes before it.
        raise about(target, error) from None
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def digest_of(trace: Trace) -> str:
    """Return the SHA-256 (hex) of what `write_trace` would write, before compression. O(n + num_runs)."""
    digest = hashlib.sha256()
    for chunk in _encode(trace):
        digest.update(chunk)
    return digest.hexdigest()


def _encode(trace: Trace) -> Iterator[bytes]:
    """Yield the file's bytes, a few thousand rows at a time."""
    import msgspec  # Here, so that a CSV trace can be loaded without it.

    encode_lines = msgspec.json.Encoder().encode_lines
    for first in range(0, len(trace), _ROWS_PER_CHUNK):
        yield encode_lines(_rows(trace, first, min(first + _ROWS_PER_CHUNK, len(trace))))


def _rows(trace: Trace, first: int, end: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"arrival_s": arrival_s, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        for arrival_s, prompt_tokens, output_tokens in zip(
            trace.arrival_s[first:end].tolist(),
            trace.prompt_tokens[first:end].tolist(),
            trace.output_tokens[first:end].tolist(),
            strict=True,
        )
    ]
    if trace.clients is not None:
        names = trace.client_names
        for row, client in zip(rows, trace.clients[first:end].tolist(), strict=True):
            row["client"] = names[client] if names else client
    if trace.priorities is not None:
        for row, priority in zip(rows, trace.priorities[first:end].tolist(), strict=True):
            row["priority"] = priority
    offsets = trace.run_offsets[first : end + 1].tolist()
    first_run = offsets[0]
    starts = trace.run_starts[first_run : offsets[-1]].tolist()
    counts = trace.run_counts[first_run : offsets[-1]].tolist()
    runs = list(zip(starts, counts, strict=True))
    for row, begin, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
        if begin < stop:
            row["hash_block_size"] = trace.content_block_size
            row["hash_runs"] = runs[begin - first_run : stop - first_run]
    return rows
