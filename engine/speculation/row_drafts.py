"""Joins a drafter, who knows samples, to a scheduler, who knows rows: what an engine's loop calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec
from weakref import WeakSet

import numpy as np

from pagedkv.arrays import Int32s, as_token_ids
from pagedkv.engine.speculation.drafter import Drafter, SampleKey
from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.scheduler import Scheduler, StepEvents

__all__ = ["RowDrafts"]

P = ParamSpec("P")
_LIVE: WeakSet[RowDrafts] = WeakSet()
"""All that somebody holds."""


class RowDrafts:
    """Keeps a drafter informed, and asks it for the rows that decode.

    In a step: `guess` and give that to `Scheduler.schedule`; `seat` the plan's admitted; sample at all `positions_of` the
    plan, keep what `accept_drafts` says, and `extend` by the events of `Scheduler.update`. `end` samples when they end.
    Python-level work for every row that decodes: a drafter is asked by sample.

    Nothing depends on guesses, so what a drafter raises ends nothing: a step goes without, and a sample of which the
    drafter did not take the tokens is not guessed for until it is seated anew.
    """

    __slots__ = ("__weakref__", "_drafter", "_max_lengths", "_on_error", "_row_keys", "_scheduler", "_vocab_size")

    def __init__(
        self,
        drafter: Drafter,
        scheduler: Scheduler,
        vocab_size: int,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """`vocab_size` is that of the target's logits; `on_error` hears of each error of the drafter.

        Raises ConfigError if the drafter cannot guess for such a model, or guesses for another engine already, whose samples
        may be called the same.
        """
        if any(other._drafter is drafter for other in _LIVE):
            raise ConfigError("this drafter guesses for another engine, which was not closed: give each its own")
        drafter.check_target(vocab_size)
        _LIVE.add(self)
        self._drafter: Drafter = drafter
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._on_error = on_error
        self._row_keys: dict[int, SampleKey] = {}
        self._max_lengths: dict[SampleKey, int] = {}

    def seat(self, row: int, key: SampleKey, token_ids: Int32s, *, max_length: int, salt: bytes = b"") -> None:
        """A sample got a row, or got one back. O(tokens).

        token_ids:  (n,) int32, what is known of it
        max_length: tokens that it may have in the end; 0 for a sample that is not to be guessed for
        """
        self._row_keys[row] = key
        self._max_lengths[key] = max_length
        if max_length and not self._succeeds(self._drafter.begin, key, token_ids, salt=salt):
            self._max_lengths[key] = 0

    def end(self, key: SampleKey) -> None:
        """A sample ended; one that never had a seat may. O(1), and what the drafter takes."""
        self._max_lengths.pop(key, None)
        self._succeeds(self._drafter.end, key)

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
        guesses: dict[int, Int32s] = {}
        if asked:
            self._succeeds(self._propose, asked, keys, limits, guesses)
        return guesses

    def _propose(self, rows: list[int], keys: list[SampleKey], limits: list[int], guesses: dict[int, Int32s]) -> None:
        """Put what the drafter guesses into `guesses`: all or nothing, if it raises or guesses what is no token."""
        drafts = self._drafter.propose(keys, limits)
        found = {row: tokens for row, tokens in zip(rows, drafts, strict=True) if len(tokens)}
        if found:
            highest = int(as_token_ids("drafts", np.concatenate(list(found.values()))).max())
            if highest >= self._vocab_size:
                raise InvalidArgumentError(f"the model has {self._vocab_size} tokens, token {highest} was guessed")
        guesses.update(found)

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
                tokens = events.token_ids[place : place + count]
                if not self._succeeds(self._drafter.extend, key, tokens):
                    self._max_lengths[key] = 0
            place += count

    def _succeeds(self, ask: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Ask the drafter, and hold what it raises."""
        try:
            ask(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a drafter may raise anything; no request depends on it
            if self._on_error is not None:
                self._on_error(error)
            return False
        return True
