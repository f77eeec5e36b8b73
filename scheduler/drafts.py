"""Speculative tokens: which guesses a step computes beside the known tokens, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows, as_token_ids, packed_runs
from pagedkv.content import TokenContent
from pagedkv.errors import InvalidArgumentError, UnknownIdError
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.outcome import NewTokens
from pagedkv.scheduler.plan import PlanDrafts
from pagedkv.scheduler.running import RunningRows

__all__ = ["DraftCounters", "Drafting", "Guesses"]


@dataclass(slots=True)
class DraftCounters:
    """How many drafts were computed since the scheduler was made, and how many of them became tokens of an answer.

    Drafts that were cut away, or whose step failed or request was aborted meanwhile, count as neither.
    """

    num_drafts: int = 0
    num_accepted_drafts: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """What the caller guesses: row -> (place of its first draft in `token_ids`, number of drafts)."""

    places: dict[int, tuple[int, int]]
    token_ids: Int32s


class Drafting:
    """Drafts take what a step leaves over, and only what comes true is kept.

    Blocks and token budget go to running rows first, then to waiting requests, then to drafts: a guess costs no request a
    seat or a block. It may cost the prefix cache one, which comes back free, or with the tokens that came true. What of it
    does not fit is dropped, not kept for the next step; the caller guesses anew then.
    """

    __slots__ = ("_max_num_batched_tokens", "_memory", "_running", "counters")

    def __init__(self, config: SchedulerConfig, memory: RowMemory, running: RunningRows) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._memory = memory
        self._running = running
        self.counters = DraftCounters()

    def check(self, drafts: Mapping[int, Sequence[int] | Int32s]) -> Guesses | None:
        """Return the guesses, checked; None if there are none. O(drafts).

        Raises InvalidArgumentError, and UnknownIdError for rows that do not run.
        """
        if not isinstance(drafts, Mapping):
            raise InvalidArgumentError(f"drafts must map rows to tokens, found {type(drafts).__name__}")
        for row in drafts:
            self._check_row(row)
        try:
            token_ids = as_token_ids("drafts", list(chain.from_iterable(drafts.values())))
            counts = [len(tokens) for tokens in drafts.values()]
        except TypeError as error:
            raise InvalidArgumentError(f"the drafts of a row must be a sequence of token ids: {error}") from None
        places, first = {}, 0
        for row, count in zip(drafts, counts, strict=True):
            places[int(row)] = (first, count)
            first += count
        return Guesses(places, token_ids) if first else None

    def _check_row(self, row: int) -> None:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise InvalidArgumentError(f"drafts are given by row, a whole number, found {row!r}")
        samples = self._running.samples
        if not 0 <= row < len(samples) or samples[row] is None:
            raise UnknownIdError(f"drafts are given for row {row}, in which nothing runs")
        if not isinstance(samples[row].content, TokenContent):
            raise InvalidArgumentError(f"drafts are given for row {row}, whose tokens are simulated")

    def plan(
        self, guesses: Guesses, num_tokens: Int64s, sampling_rows: Rows, sources: Int64s, *, forking: set[int]
    ) -> PlanDrafts | None:
        """Give drafts their slots, beside the `num_tokens` that each row computes anyway; None if there is no room for any.

        A row gets drafts if it computes exactly its last token, and is not `forking` off the other samples of its
        request, with which it shares its last block. They are cut to the token budget and to the blocks that can be had, in
        order of `sampling_rows`, and to what the row may still sample, less the token that follows the last draft.
        O(rows + drafts).
        """
        wanted = np.zeros(len(sampling_rows), np.int64)
        firsts = np.zeros(len(sampling_rows), np.int64)
        places = guesses.places
        for i in (num_tokens[sources] == 1).nonzero()[0].tolist():
            row = int(sampling_rows[i])
            if row in places and row not in forking:
                firsts[i], wanted[i] = places[row]
        num_left = self._running.max_tokens[sampling_rows] - self._memory.sequences.num_known[sampling_rows]
        wanted = np.minimum(wanted, num_left - 1)
        budget = self._max_num_batched_tokens - int(np.add.reduce(num_tokens))
        slots = self._memory.drafts
        counts = slots.num_fitting(sampling_rows, (budget - wanted.cumsum() + wanted).clip(0, wanted))
        drafted = counts.nonzero()[0]
        if not len(drafted) or not slots.try_give(sampling_rows[drafted], counts[drafted]):
            return None
        return PlanDrafts(counts, guesses.token_ids[packed_runs(firsts, counts)])

    def settle(self, new: NewTokens, *, cuts_at_stops: bool) -> NewTokens:
        """Make the new tokens known, keep the slots of accepted drafts, give back the others.

        What comes behind a stop token is dropped. Returns the tokens that were kept. O(rows + tokens).
        """
        tokens, counts = new.token_ids, new.num_tokens
        # Rows are counted where some had drafts, and drafts are tokens; no row is left if all were aborted.
        if tokens is None or counts is None or not len(counts):
            return new
        if cuts_at_stops:
            tokens, counts = self._cut_at_stops(new.rows, tokens, counts)
            new = new._replace(token_ids=tokens, num_tokens=counts)
        memory = self._memory
        firsts = counts.cumsum() - counts
        for nth in range(int(counts.max())):
            longer = counts > nth
            memory.tokens.extend(new.rows[longer], tokens[firsts[longer] + nth])
        self.counters.num_drafts += int(np.add.reduce(memory.sequences.num_drafts[new.rows]))
        self.counters.num_accepted_drafts += int(np.add.reduce(counts - 1))
        memory.drafts.settle(new.rows, counts - 1)
        return new

    def _cut_at_stops(self, rows: Rows, token_ids: Int32s, counts: Int64s) -> tuple[Int32s, Int64s]:
        """Tokens up to the first that ends its row, and how many those are. O(tokens)."""
        tokens, kept = token_ids.tolist(), counts.copy()
        firsts = counts.cumsum() - counts
        for i in (counts > 1).nonzero()[0].tolist():
            stops = self._running.samples[rows[i]].request.stop_token_ids
            first = int(firsts[i])
            run = tokens[first : first + int(counts[i])]
            kept[i] = next((nth for nth, token in enumerate(run, start=1) if token in stops), len(run))
        return token_ids[packed_runs(firsts, kept)], kept
