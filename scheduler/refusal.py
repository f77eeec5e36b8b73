"""Requests that are not taken: they could never run, or too many wait."""

from __future__ import annotations

from pagedkv.arrays import cdiv
from pagedkv.errors import InvalidArgumentError, PagedKVError
from pagedkv.scheduler.client_shares import ClientShares
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.request import Request

__all__ = ["QueueFullError", "RequestTooLargeError", "reason_to_refuse"]


class RequestTooLargeError(InvalidArgumentError):
    """The request could never run, however empty the memory: refused when it is added, with the arithmetic."""


class QueueFullError(PagedKVError):
    """Expected shortage: as many requests wait as may, of this client or of all. Nothing has changed; try again later."""


def reason_to_refuse(
    request: Request,
    num_prompt: int,
    config: SchedulerConfig,
    *,
    num_blocks: int,
    block_size: int,
    shares: ClientShares,
) -> str:
    """Why the request can never run on a pool of `num_blocks` blocks; empty if it can. O(1)."""
    # The K/V of the last sampled token is never computed.
    num_tokens = num_prompt + max(request.max_new_tokens - 1, 0)
    num_needed = cdiv(num_tokens, block_size)
    if num_needed > num_blocks:
        return (
            f"{num_prompt} prompt + {request.max_new_tokens} new tokens need {num_needed} blocks of {block_size}, "
            f"the pool has {num_blocks}"
        )
    if request.n > config.max_num_running:
        return f"{request.n} samples need as many seats, there are {config.max_num_running}"
    if not config.chunked_prefill and num_tokens > config.max_num_batched_tokens:
        return (
            f"up to {num_tokens} tokens must be computed in one step without chunked prefill, "
            f"the budget is {config.max_num_batched_tokens}"
        )
    return shares.reason_to_refuse(request.n, request.n * num_needed)
