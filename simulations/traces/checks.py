"""What every trace promises, checked in bulk: the first request that breaks a promise, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces import limits
from pagedkv.simulations.traces.content import find_prefix_conflict

if TYPE_CHECKING:
    from pagedkv.simulations.traces.trace import Trace

__all__ = ["Problem", "excerpt", "find_problem", "find_twin"]

_EXCERPT_CHARS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """A promise that request number `request` breaks, in the words of an error message."""

    request: int
    expected: str
    found: str


def excerpt(value: object) -> str:
    """Render a found value on one line of at most 60 characters, so that no message dumps a file."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _EXCERPT_CHARS else f"{text[: _EXCERPT_CHARS - 3]}..."


def find_twin(names: Sequence[str]) -> str | None:
    """Return the first name that occurs twice, or None. O(n)."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def find_problem(trace: Trace) -> Problem | None:
    """Return a broken promise of these columns, or None. Shapes must be consistent. O(n + R log R)."""
    return (
        _find_in_arrivals(trace.arrival_s)
        or _find_out_of_range(trace.prompt_tokens, "prompt tokens", 1, limits.MAX_TOKENS)
        or _find_out_of_range(trace.output_tokens, "output tokens", 0, limits.MAX_TOKENS)
        or _find_in_priorities(trace)
        or _find_in_clients(trace)
        or _find_in_content(trace)
    )


def _first(is_bad: npt.NDArray[np.bool_]) -> int | None:
    return int(is_bad.argmax()) if is_bad.any() else None


def _find_in_arrivals(arrival_s: npt.NDArray[np.float64]) -> Problem | None:
    # Written so that NaN, which compares false with everything, is bad as well.
    request = _first(~((arrival_s >= 0) & (arrival_s <= limits.MAX_ARRIVAL_S)))
    if request is not None:
        return Problem(request, f"an arrival of 0 to {limits.MAX_ARRIVAL_S:g} s", f"{arrival_s[request]} s")
    request = _first(arrival_s[1:] < arrival_s[:-1])
    if request is not None:
        before, after = arrival_s[request], arrival_s[request + 1]
        return Problem(request + 1, f"arrivals in order (not before {before} s)", f"{after} s")
    return None


def _find_out_of_range(values: npt.NDArray[np.int64], what: str, low: int, high: int) -> Problem | None:
    request = _first((values < low) | (values > high))
    return None if request is None else Problem(request, f"{what} of {low} to {high}", str(values[request]))


def _find_in_priorities(trace: Trace) -> Problem | None:
    if trace.priorities is None:
        return None
    request = _first(~np.isfinite(trace.priorities))
    return None if request is None else Problem(request, "a finite priority", str(trace.priorities[request]))


def _find_in_clients(trace: Trace) -> Problem | None:
    if trace.clients is None:
        return None
    if not trace.client_names:
        return _find_out_of_range(trace.clients, "a client", 0, limits.MAX_CONTENT_ID)
    seen, first_requests = np.unique(trace.clients, return_index=True)
    if (
        len(seen) != len(trace.client_names)
        or seen[0] != 0
        or seen[-1] != len(seen) - 1
        or np.any(np.diff(first_requests) < 0)
    ):
        return Problem(0, "named clients numbered in order of first appearance", excerpt(seen[:8].tolist()))
    return None


def _find_in_content(trace: Trace) -> Problem | None:
    starts, counts, offsets = trace.run_starts, trace.run_counts, trace.run_offsets
    block_size = trace.content_block_size
    if block_size is None:
        return Problem(0, "a content block size with content ids", "none") if len(starts) else None
    if not 1 <= block_size <= limits.MAX_CONTENT_BLOCK_SIZE:
        return Problem(0, f"a content block size of 1 to {limits.MAX_CONTENT_BLOCK_SIZE}", excerpt(block_size))
    last_id = limits.MAX_CONTENT_ID
    # `start > last - count + 1` rather than `start + count > …`, which could overflow.
    run = _first((starts < 0) | (counts < 1) | (counts > limits.MAX_TOKENS) | (starts > last_id - counts + 1))
    if run is not None:
        found = f"a run of {counts[run]} from {starts[run]}"
        return Problem(_request_of(run, offsets), f"runs of 1 or more content ids of 0 to {last_id}", found)
    num_ids, prompts = trace.num_content_ids(), trace.prompt_tokens
    is_good = (num_ids == 0) | (num_ids == prompts // block_size) | (num_ids == -(-prompts // block_size))
    request = _first(~is_good)
    if request is not None:
        expected = (
            f"{-(-prompts[request] // block_size)} content ids for {prompts[request]} tokens in blocks of {block_size}"
        )
        return Problem(request, expected, str(num_ids[request]))
    run = find_prefix_conflict(starts, counts, offsets)
    if run is not None:
        found = f"id {starts[run]} after different ones"
        return Problem(_request_of(run, offsets), "prefix ids (each id always after the same ids)", found)
    return None


def _request_of(run: int, offsets: npt.NDArray[np.int64]) -> int:
    return int(np.searchsorted(offsets, run, side="right")) - 1
