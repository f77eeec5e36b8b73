"""Joins a drafter, who knows samples, to a scheduler, who knows rows: what an engine's loop calls."""

from __future__ import annotations

from pagedkv.arrays import Int32s
from pagedkv.engine.speculation.drafter import Drafter, SampleKey
from pagedkv.scheduler import Scheduler, StepEvents

__all__ = ["RowDrafts"]


class RowDrafts:
    """Keeps a drafter informed, and asks it for the rows that decode.

    In a step: `guess` and give that to `Scheduler.schedule`; `seat` the plan's admitted; sample at all `positions_of` the
    plan, keep what `accept_drafts` says, and `extend` by the events of `Scheduler.update`. `end` samples when they end.
    Python-level work for every row that decodes: a drafter is asked by sample.
    """

    __slots__ = ("_drafter", "_max_lengths", "_row_keys", "_scheduler")

    def __init__(self, drafter: Drafter, scheduler: Scheduler, vocab_size: int) -> None:
        """`vocab_size` is that of the target's logits. Raises ConfigError if the drafter cannot guess for such a model."""
        drafter.check_target(vocab_size)
        self._drafter = drafter
        self._scheduler = scheduler
        self._row_keys: dict[int, SampleKey] = {}
        self._max_lengths: dict[SampleKey, int] = {}

    def seat(self, row: int, key: SampleKey, token_ids: Int32s, *, max_length: int, salt: bytes = b"") -> None:
        """A sample got a row, or got one back. O(tokens).

        token_ids:  (n,) int32, what is known of it
        max_length: tokens that it may have in the end; 0 for a sample that is not to be guessed for
        """
        self._row_keys[row] = key
        self._max_lengths[key] = max_length
        if max_length:
            self._drafter.begin(key, token_ids, salt=salt)

    def end(self, key: SampleKey) -> None:
        """A sample ended; one that never had a seat may. O(1), and what the drafter takes."""
        self._max_lengths.pop(key, None)
        self._drafter.end(key)

    def guess(self) -> dict[int, Int32s]:
        """Row -> guesses, for the rows that have exactly their last token to compute and more than one to sample."""
        table = self._scheduler.manager.memory.sequences
        rows = self._scheduler.running_rows
        num_known = table.num_known[rows]
        is_decode = num_known - table.num_computed[rows] == 1
        asked, keys, limits = [], [], []
        for row, length in zip(rows[is_decode].tolist(), num_known[is_decode].tolist(), strict=True):
            key = self._row_keys.get(row)
            # A row whose step failed before its sample was seated is not known yet.
            limit = self._max_lengths.get(key, 0) - length - 1 if key is not None else 0
            if key is not None and limit > 0:
                asked.append(row)
                keys.append(key)
                limits.append(limit)
        drafts = self._drafter.propose(keys, limits) if asked else []
        return {row: tokens for row, tokens in zip(asked, drafts, strict=True) if len(tokens)}

    def extend(self, events: StepEvents) -> None:
        """Tell the drafter which tokens its samples got; before they are ended."""
        if events.token_ids is None:
            return
        samples = events.samples.tolist()
        counts = [1] * len(samples) if events.num_tokens is None else events.num_tokens.tolist()
        place = 0
        for sample, count in zip(samples, counts, strict=True):
            key = (sample.request.request_id, sample.sample_idx)
            if self._max_lengths.get(key, 0):
                self._drafter.extend(key, events.token_ids[place : place + count])
            place += count
