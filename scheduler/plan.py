"""What to compute in one step, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Int64s, Rows, as_token_ids
from pagedkv.errors import InvalidArgumentError, StalePlanError
from pagedkv.plans import BlockCopies
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.sample import Sample

__all__ = ["Output", "Seat", "StepEvents", "StepPlan"]


class PlanInputs:
    """The packed arrays of a plan, made when first asked for: a simulator never asks."""

    __slots__ = ("is_stale", "memory", "query_start_loc", "slot_mapping", "token_ids")

    def __init__(self, memory: RowMemory) -> None:
        self.memory = memory
        self.is_stale = False
        self.query_start_loc: Int32s | None = None
        self.slot_mapping: Int64s | None = None
        self.token_ids: Int32s | None = None

    def require_fresh(self) -> RowMemory:
        if self.is_stale:
            raise StalePlanError("the tables have moved on: read a plan's packed arrays before updating it")
        return self.memory


class Seat(NamedTuple):
    """A row that was given to a sample: what an engine must know to sample for it."""

    row: int
    request_id: str
    sample_idx: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The rows of one step. Immutable; packed arrays are made on first access, which must come before the update.

    step:             number of the step, from 0
    rows:             (n,) int64, rows of the block tables that compute something
    num_tokens:       (n,) int64, how many tokens each computes
    starts:           (n,) int64, position of its first one
    sampling_rows:    (s,) int64, rows that need a new token from this step's logits
    sampling_sources: (s,) int64, index into `rows` of the row whose last logits to sample from
    admitted:         rows that begin or come back in this step, forks included
    swaps_out, copies, swaps_in: block copies to make before the step, in this order
    """

    step: int
    rows: Rows
    num_tokens: Int64s
    starts: Int64s
    sampling_rows: Rows
    sampling_sources: Int64s
    admitted: tuple[Seat, ...]
    swaps_out: BlockCopies
    copies: BlockCopies
    swaps_in: BlockCopies
    inputs: PlanInputs

    @property
    def num_rows(self) -> int:
        """Number of rows that compute something; a plan may be empty."""
        return len(self.rows)

    @property
    def seq_lens(self) -> Int64s:
        """(n,) int64: context length of each row after this step."""
        return self.starts + self.num_tokens

    @property
    def query_start_loc(self) -> Int32s:
        """(n + 1,) int32: row i's tokens stand at `query_start_loc[i]` to `query_start_loc[i + 1] - 1` when packed."""
        inputs = self.inputs
        if inputs.query_start_loc is None:
            inputs.query_start_loc = np.zeros(len(self.rows) + 1, np.int32)
            np.cumsum(self.num_tokens, out=inputs.query_start_loc[1:])
        return inputs.query_start_loc

    @property
    def logit_indices(self) -> Int64s:
        """(s,) int64: packed position of the token whose logits give each sampling row its token."""
        indices: Int64s = self.query_start_loc[self.sampling_sources + 1].astype(np.int64) - 1
        return indices

    @property
    def positions(self) -> Int64s:
        """(tokens,) int64: position of each packed token in its sequence."""
        if self._is_decode:
            return self.starts
        offsets = self.starts - self.query_start_loc[:-1]
        return np.repeat(offsets, self.num_tokens) + np.arange(self.query_start_loc[-1])

    @property
    def slot_mapping(self) -> Int64s:
        """(tokens,) int64: slot into which each packed token's K/V goes. O(tokens)."""
        inputs = self.inputs
        if inputs.slot_mapping is None:
            rows = self.rows if self._is_decode else np.repeat(self.rows, self.num_tokens)
            inputs.slot_mapping = inputs.require_fresh().sequences.slots(rows, self.positions)
        return inputs.slot_mapping

    @property
    def token_ids(self) -> Int32s:
        """(tokens,) int32: packed token ids; raises InvalidArgumentError for simulated prompts. O(tokens)."""
        inputs = self.inputs
        if inputs.token_ids is None:
            inputs.token_ids = inputs.require_fresh().token_ids(self.rows, self.starts, self.num_tokens)
        return inputs.token_ids

    def check_tokens(self, token_ids: Sequence[int] | Int32s) -> Int32s:
        """Return the tokens sampled for `sampling_rows`, (s,) int32; InvalidArgumentError for wrong ones or too many or few."""
        tokens = as_token_ids("token_ids", token_ids)
        if len(tokens) != len(self.sampling_rows):
            raise InvalidArgumentError(
                f"{len(self.sampling_rows)} rows sample in this step, found {len(tokens)} tokens"
            )
        return tokens

    def make_inputs(self) -> None:
        """Make the packed arrays now, before a row that they read is let go of. O(tokens)."""
        _ = self.slot_mapping
        with suppress(InvalidArgumentError):  # Simulated prompts have no token ids.
            _ = self.token_ids

    @property
    def _is_decode(self) -> bool:
        return len(self.rows) == 0 or int(self.num_tokens.max()) == 1


class Output(NamedTuple):
    """One new token of one sample."""

    request_id: str
    sample_idx: int
    token_id: int | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True, eq=False)
class StepEvents:
    """What an update brought about.

    rows:      (s,) int64, rows that got a token
    token_ids: (s,) int32, or None where tokens are only simulated
    finished:  samples that ended, with the reason
    """

    step: int
    rows: Rows
    token_ids: Int32s | None
    samples: NDArray[np.object_]
    finished: tuple[tuple[Sample, str], ...]

    @property
    def outputs(self) -> list[Output]:
        """New tokens with the requests that they belong to, for people and streams. O(s)."""
        reasons = {id(sample): reason for sample, reason in self.finished}
        tokens = [None] * len(self.samples) if self.token_ids is None else self.token_ids.tolist()
        return [
            Output(sample.request.request_id, sample.sample_idx, token, reasons.get(id(sample)))
            for sample, token in zip(self.samples.tolist(), tokens, strict=True)
        ]

    @property
    def finished_ids(self) -> list[str]:
        """Ids of requests of which a sample ended in this step."""
        return [sample.request.request_id for sample, _ in self.finished]
