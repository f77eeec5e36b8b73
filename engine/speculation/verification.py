"""Where a step with guesses samples, and which of the tokens are those that plain decoding would have sampled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows, packed_runs
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import StepPlan

__all__ = ["Accepted", "accept_drafts", "positions_of"]


class Accepted(NamedTuple):
    """What a step's rows keep of the tokens that were sampled at their positions.

    num_tokens: (s,) int64, how many each row keeps: the drafts that came true, and one more
    kept:       (t,) int64, which of the sampled positions they are, packed; what else was sampled never happened, so an
                error or a log-probability at another position is nobody's
    token_ids:  (t,) int32, the tokens at these positions
    """

    num_tokens: Int64s
    kept: Int64s
    token_ids: Int32s


def positions_of(plan: StepPlan) -> tuple[Rows, Int64s]:
    """For each of `plan.logit_indices`: the row, and how many tokens its sequence has before the one to sample. O(positions)."""
    lengths = plan.seq_lens[plan.sampling_sources].astype(np.int64)
    if plan.drafts is None:
        return plan.sampling_rows, lengths
    num_drafts = plan.drafts.num_tokens
    return plan.sampling_rows.repeat(num_drafts + 1), packed_runs(lengths - num_drafts, num_drafts + 1)


def accept_drafts(token_ids: Int32s, draft_token_ids: Int32s, num_drafts: Int64s) -> Accepted:
    """Keep each row's tokens up to the first that differs from the draft at its position, that one included.

    token_ids:       (s + d,) int32, packed; row i's tokens sampled after its last known one and after each of its drafts
    draft_token_ids: (d,) int32, packed
    num_drafts:      (s,) int64, drafts of each row; d is their sum

    O(s + d), a fixed number of array operations. Raises InvalidArgumentError if the lengths do not add up.

    The kept tokens are those of plain decoding, one by one, at any temperature. The sampler's token at a position is a
    function of the tokens before it, of the row's seed and of the position; while all drafts so far came true, the tokens
    before are what plain decoding would have there, so the token is, too, be it equal to the next draft or not. The first
    that is not makes everything behind it void. In general a draft x that was drawn from q is accepted with probability
    min(1, p(x) / q(x)), and a rejected one replaced by a draw from the positive part of p - q (Leviathan, Kalman, Matias,
    "Fast Inference from Transformers via Speculative Decoding", ICML 2023, section 2.3), which keeps the distribution but
    needs q and random numbers of its own. Our drafts are not drawn: q is 1 at x. The rule then accepts with probability
    p(x), which is how often a token sampled from p equals x, and what is sampled where it does not is a draw from the rest
    of p. So comparing loses no acceptance, and with the position's own random number keeps the very tokens.

    >>> accepted = accept_drafts(np.array([5, 6, 7, 8, 9]), np.array([5, 0, 8]), np.array([2, 1]))
    >>> accepted.num_tokens.tolist(), accepted.token_ids.tolist()
    ([2, 2], [5, 6, 8, 9])
    """
    num_total = len(draft_token_ids)
    if int(np.add.reduce(num_drafts)) != num_total or len(token_ids) != len(num_drafts) + num_total:
        raise InvalidArgumentError(
            f"{len(num_drafts)} rows with {int(np.add.reduce(num_drafts))} drafts, found {num_total} drafts and "
            f"{len(token_ids)} sampled tokens"
        )
    counts = num_drafts + 1
    stops = counts.cumsum()
    firsts = stops - counts
    # A row's last position has no draft to compare with: whatever is sampled there ends the row.
    is_end = np.zeros(len(token_ids), np.bool_)
    is_end[stops - 1] = True
    is_end[~is_end] = token_ids[~is_end] != draft_token_ids
    ends = is_end.nonzero()[0]
    num_tokens: Int64s = ends[ends.searchsorted(firsts)] - firsts + 1
    kept = packed_runs(firsts, num_tokens)
    return Accepted(num_tokens, kept, token_ids[kept])
