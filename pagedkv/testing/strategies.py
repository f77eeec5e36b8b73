"""Hypothesis strategies for what a serving system meets: requests, traces of them, and faults."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from pagedkv.arrays import cdiv
from pagedkv.scheduler import Request
from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS
from pagedkv.testing.soak.settings import Fault, FaultKind

__all__ = ["DrawnTrace", "TracedRequest", "faults", "request_ids", "requests", "traces"]


class TracedRequest(NamedTuple):
    """One line of a trace: when it came, how long it is, and the ids of the blocks that its prompt shares with others."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: int
    content_ids: tuple[int, ...]


class DrawnTrace(NamedTuple):
    """Requests in order of arrival, ties among them; equal content ids mean equal prefixes, one for each block or part."""

    content_block_size: int
    requests: tuple[TracedRequest, ...]


def request_ids() -> st.SearchStrategy[str]:
    """Ids as clients choose them: short ones that collide, and any text."""
    return st.sampled_from(["a", "b", "0", "a ", "A"]) | st.text(min_size=1, max_size=20)


@st.composite
def requests(
    draw: st.DrawFn,
    *,
    ids: st.SearchStrategy[str] | None = None,
    vocabulary: int = 3,
    max_prompt: int = 12,
    max_new: int = 8,
    max_samples: int = 3,
) -> Request:
    """A request with real tokens, few enough of them that prompts share beginnings; salts, stops and samples included.

    Samples, stop tokens and salts shrink away first, then lengths.
    """
    token = st.integers(0, vocabulary - 1)
    return Request(
        draw(request_ids() if ids is None else ids),
        draw(st.lists(token, min_size=1, max_size=max_prompt)),
        draw(st.integers(0, max_new)),
        n=draw(st.just(1) | st.integers(1, max_samples)),
        stop_token_ids=draw(st.just(()) | st.lists(token, max_size=2).map(tuple)),
        salt=draw(st.just(b"") | st.sampled_from([b"x", b"y"]) | st.binary(max_size=64)),
        priority=draw(st.just(0.0) | st.floats(-1e6, 1e6)),
        reads_cache=draw(st.just(True) | st.booleans()),
    )


@st.composite
def traces(
    draw: st.DrawFn, *, max_requests: int = 20, max_prompt: int = 64, max_output: int = 32, num_clients: int = 3
) -> DrawnTrace:
    """A trace: bursts and gaps, prompts that continue earlier ones as turns of a chat do, prompts of all lengths."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    arrival_s, next_id = 0.0, 0
    drawn: list[TracedRequest] = []
    for _ in range(draw(st.integers(1, max_requests))):
        arrival_s += draw(st.sampled_from([0.0, 0.0, 0.5]) | st.floats(0.0, 60.0))
        num_prompt = draw(st.integers(1, max_prompt))
        num_blocks = cdiv(num_prompt, block_size)
        # Only whole blocks are continued: the last id of a prompt may stand for a part of a block.
        earlier = draw(st.none() | st.sampled_from(drawn)) if drawn else None
        most = 0 if earlier is None else min(earlier.prompt_tokens // block_size, num_prompt // block_size)
        shared = () if earlier is None else earlier.content_ids[: draw(st.integers(0, most))]
        fresh = tuple(range(next_id, next_id + num_blocks - len(shared)))
        next_id += len(fresh)
        num_output = draw(st.integers(0, max_output))
        client = draw(st.integers(0, num_clients - 1))
        drawn.append(TracedRequest(arrival_s, num_prompt, num_output, client, shared + fresh))
    return DrawnTrace(block_size, tuple(drawn))


@st.composite
def faults(draw: st.DrawFn, *, max_step: int = 60, max_faults: int = 12) -> list[Fault]:
    """Things that go wrong in some of the first steps, each kind with a detail that makes sense for it."""
    num_points = len(ALLOCATION_POINTS)
    details = {
        FaultKind.ALLOCATION: st.integers(num_points, 6 * num_points - 1),
        FaultKind.CLOCK_JUMP: st.integers(-100_000, 100_000),
        FaultKind.COPY_PARTIAL: st.integers(0, 5),
        FaultKind.ABORT: st.integers(0, 20),
    }
    drawn = []
    for _ in range(draw(st.integers(0, max_faults))):
        kind = draw(st.sampled_from(FaultKind))
        drawn.append(Fault(draw(st.integers(0, max_step)), kind, draw(details.get(kind, st.integers(1, 15)))))
    return drawn
