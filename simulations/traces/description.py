"""Statistics of a trace: load, lengths, clients, and what an unlimited prefix cache could save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pagedkv.simulations.traces.content import leading_hits

if TYPE_CHECKING:
    from pagedkv.simulations.traces.trace import Trace

__all__ = ["describe_trace"]


def describe_trace(trace: Trace) -> dict[str, Any]:
    """Return the statistics of `trace` as plain Python numbers, ready for JSON.

    name, format, digest:         of the trace
    num_requests, num_prefill_only: requests; those with no output token
    span_s, requests_per_s:       last minus first arrival; `num_requests / span_s` (None if the span is 0)
    interarrival_cv:              standard deviation over mean of the gaps (None if undefined)
    prompt_tokens, output_tokens: each a dictionary of `mean, p50, p90, p99, max, total`; linear interpolation
    max_request_tokens:           the longest prompt plus output
    num_clients:                  None where the trace names none
    content:                      None without content ids, else a dictionary: `block_size, num_blocks` (looked up),
                                  `num_unique_blocks`, and the infinite-cache ceilings `block_hit_ratio`,
                                  `token_hit_ratio`

    The ceilings follow one rule: requests in order; a hit is a leading run of blocks seen before; a request's own
    blocks are inserted after its lookup. Tokens are counted over the prompts that have ids. O(n log n + R log R).
    """
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    return {
        "name": trace.name,
        "format": trace.format,
        "digest": trace.digest,
        "num_requests": len(trace),
        "num_prefill_only": int(np.count_nonzero(trace.output_tokens == 0)),
        "span_s": span_s,
        "requests_per_s": len(trace) / span_s if span_s > 0 else None,
        "interarrival_cv": _coefficient_of_variation(np.diff(trace.arrival_s)),
        "prompt_tokens": _describe_lengths(trace.prompt_tokens),
        "output_tokens": _describe_lengths(trace.output_tokens),
        "max_request_tokens": int((trace.prompt_tokens + trace.output_tokens).max()),
        "num_clients": None if trace.clients is None else len(np.unique(trace.clients)),
        "content": _describe_content(trace),
    }


def _coefficient_of_variation(gaps: npt.NDArray[np.float64]) -> float | None:
    if len(gaps) < 2 or gaps.mean() <= 0:
        return None
    return float(gaps.std() / gaps.mean())


def _describe_lengths(tokens: npt.NDArray[np.int64]) -> dict[str, float | int]:
    p50, p90, p99 = np.percentile(tokens, [50, 90, 99]).tolist()
    return {
        "mean": float(tokens.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": int(tokens.max()),
        "total": int(tokens.sum()),
    }


def _describe_content(trace: Trace) -> dict[str, float | int] | None:
    if trace.content_block_size is None:
        return None
    num_ids = trace.num_content_ids()
    hits = leading_hits(trace.run_starts, trace.run_counts, trace.run_offsets)
    num_blocks, num_hits = int(num_ids.sum()), int(hits.sum())
    hit_tokens = np.minimum(hits * trace.content_block_size, trace.prompt_tokens)
    tokens = int(trace.prompt_tokens[num_ids > 0].sum())
    return {
        "block_size": trace.content_block_size,
        "num_blocks": num_blocks,
        "num_unique_blocks": num_blocks - num_hits,
        "block_hit_ratio": num_hits / num_blocks,
        "token_hit_ratio": int(hit_tokens.sum()) / tokens,
    }
