"""How long a request may take at most, in steps: what the scheduler states, and its tests hold it to."""

from __future__ import annotations

from pagedkv.arrays import cdiv
from pagedkv.scheduler.config import SchedulerConfig

__all__ = ["steps_to_serve"]


def steps_to_serve(num_prompt: int, max_new_tokens: int, num_samples: int, config: SchedulerConfig) -> int:
    """The most steps that count as this request's, until it is through. O(1).

    A step in which somebody gets a token, or ends, counts as one of theirs: `max_new_tokens` of a request, since no token is
    ever lost. In any other step no row wants a single token, so the first row gets as much of the budget as one row may
    have: it has computed a whole chunk, which happens once for each chunk but the last, after each of its
    `max_preemptions + 1` admissions.

    No plan is empty while somebody waits, so each step counts as the step of one that runs in it. So all requests that are
    there get through in no more steps than the sum over them, once no more come, no step fails, and nobody else uses the
    memory. Likewise a request waits no longer than the sum over those that run when its wait begins, those that are or come
    before it in the queue, and the `max_bypasses` that may pass it.

    >>> steps_to_serve(20, 10, 1, SchedulerConfig(8, 4, max_preemptions=2))
    19
    """
    chunk = min(config.max_num_batched_tokens, config.long_prefill_tokens or config.max_num_batched_tokens)
    num_slots = max(num_prompt, num_prompt + max_new_tokens - 1)
    num_unfinished = (config.max_preemptions + 1) * (cdiv(num_slots, chunk) - 1)
    return num_samples * (max(max_new_tokens, 1) + num_unfinished)
