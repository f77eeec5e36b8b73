"""What an engine says that came of a step: new tokens, how many each row got, and which rows it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Int64s, Rows, as_token_ids
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler.plan import PlanDrafts, StepPlan

__all__ = ["NewTokens", "StepOutcome", "checked_outcome"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class StepOutcome:
    """New tokens of a step whose rows got several, or of which the engine ends some.

    token_ids:  (t,) int32, packed, one sampling row after the other; None if all prompts are simulated
    num_tokens: (s,) int64, how many each of `plan.sampling_rows` got: accepted drafts and one more; None: one each
    stopped:    (s,) bool, rows that end with these tokens, for a reason that only the engine sees (a stop string);
                other samples of the same request go on. None: no row

    >>> StepOutcome([7, 8, 5], num_tokens=[2, 1], stopped=[False, True]).stopped
    [False, True]
    """

    token_ids: Sequence[int] | Int32s | None = field(repr=False)
    num_tokens: Sequence[int] | Int64s | None = None
    stopped: Sequence[bool] | Bools | None = None


class NewTokens(NamedTuple):
    """An outcome that was checked.

    rows:       (s,) int64, rows that got tokens
    token_ids:  (t,) int32, packed; None where tokens are only simulated
    num_tokens: (s,) int64; None, the common case: one each, and no row had drafts
    stopped:    (s,) bool; None: the engine ends no row
    """

    rows: Rows
    token_ids: Int32s | None
    num_tokens: Int64s | None = None
    stopped: Bools | None = None

    @property
    def last_token_ids(self) -> Int32s | None:
        """(s,) int32: the last new token of each row."""
        if self.token_ids is None or self.num_tokens is None:
            return self.token_ids
        last: Int32s = self.token_ids[self.num_tokens.cumsum() - 1]
        return last

    def only(self, kept: Bools) -> NewTokens:
        """The same without the rows that are not `kept`, (s,) bool."""
        of_kept = kept if self.num_tokens is None else kept.repeat(self.num_tokens)
        return NewTokens(
            self.rows[kept],
            None if self.token_ids is None else self.token_ids[of_kept],
            None if self.num_tokens is None else self.num_tokens[kept],
            None if self.stopped is None else self.stopped[kept],
        )


def checked_outcome(
    plan: StepPlan, outcome: StepOutcome | Sequence[int] | Int32s | None, *, needs_token_ids: bool
) -> NewTokens:
    """Return the outcome of `plan` as arrays. Plain tokens are one for each row. Raises InvalidArgumentError. O(tokens)."""
    num_tokens, stopped = None, None
    if isinstance(outcome, StepOutcome):
        token_ids = outcome.token_ids
        num_tokens, stopped = _checked_counts(plan, outcome.num_tokens), _checked_flags(plan, outcome.stopped)
    else:
        token_ids = outcome
    rows = plan.sampling_rows
    if plan.drafts is not None and num_tokens is None:
        num_tokens = np.ones(len(rows), np.int64)
    if token_ids is None:
        if needs_token_ids and len(rows):
            raise InvalidArgumentError("token_ids may be None only while every prompt is simulated")
        return NewTokens(rows, None, None, stopped)
    tokens = as_token_ids("token_ids", token_ids)
    if plan.drafts is not None and num_tokens is not None:
        _check_accepted(plan.sampling_rows, plan.drafts, tokens, num_tokens)
    elif len(tokens) != len(rows):
        raise InvalidArgumentError(f"{len(rows)} rows sample in this step, found {len(tokens)} tokens")
    return NewTokens(rows, tokens, num_tokens, stopped)


def _checked_counts(plan: StepPlan, num_tokens: Sequence[int] | Int64s | None) -> Int64s | None:
    """How many tokens each row got, None if one each; 1 to its drafts + 1."""
    if num_tokens is None:
        return None
    counts = as_token_ids("num_tokens", num_tokens).astype(np.int64)
    rows = plan.sampling_rows
    if len(counts) != len(rows):
        raise InvalidArgumentError(f"{len(rows)} rows sample in this step, found {len(counts)} num_tokens")
    most: Int64s | int = 1 if plan.drafts is None else plan.drafts.num_tokens + 1
    wrong = ((counts < 1) | (counts > most)).nonzero()[0]
    if len(wrong):
        i = int(wrong[0])
        highest = int(np.broadcast_to(most, counts.shape)[i])
        raise InvalidArgumentError(f"row {rows[i]} gets 1..{highest} tokens in this step, found {counts[i]}")
    return None if plan.drafts is None else counts


def _checked_flags(plan: StepPlan, stopped: Sequence[bool] | Bools | None) -> Bools | None:
    """Which rows the engine ends, None if none."""
    if stopped is None:
        return None
    num_rows = len(plan.sampling_rows)
    try:
        flags = np.asarray(stopped)
    except ValueError as error:
        raise InvalidArgumentError(f"stopped must be {num_rows} booleans: {error}") from None
    if flags.shape != (num_rows,) or (num_rows and flags.dtype != np.bool_):
        raise InvalidArgumentError(
            f"stopped must be {num_rows} booleans, one for each row that samples, found {flags.dtype} of {flags.shape}"
        )
    return flags if flags.any() else None


def _check_accepted(rows: Rows, drafts: PlanDrafts, token_ids: Int32s, num_tokens: Int64s) -> None:
    """Raise InvalidArgumentError unless all tokens of a row but its last are its first drafts."""
    if len(token_ids) != int(np.add.reduce(num_tokens)):
        raise InvalidArgumentError(f"num_tokens add up to {num_tokens.sum()}, found {len(token_ids)} tokens")
    accepted = drafts.first(num_tokens - 1)
    is_last = np.zeros(len(token_ids), np.bool_)
    is_last[num_tokens.cumsum() - 1] = True
    wrong = (token_ids[~is_last] != accepted).nonzero()[0]
    if len(wrong):
        owner = rows.repeat(num_tokens - 1)[wrong[0]]
        raise InvalidArgumentError(f"row {owner}: all new tokens but the last must equal its drafts, one does not")
