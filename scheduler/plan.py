"""What to compute in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import BlockIds, Int32s, Int64s, Rows, packed_runs
from pagedkv.errors import StalePlanError
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.row_memory import RowMemory

__all__ = ["PlanDrafts", "Seat", "StepPlan"]


class PlanInputs:
    """The packed arrays of a plan, made when first asked for: a simulator never asks. `taken`: blocks, call by call."""

    __slots__ = (
        "is_decode",
        "is_single",
        "is_stale",
        "memory",
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
        "taken",
        "token_ids",
    )

    def __init__(self, memory: RowMemory, taken: list[BlockIds], *, is_decode: bool = False) -> None:
        self.memory = memory
        self.taken = taken
        """Whether all of them were made that can be: then rows may be gone that they were made from."""
        self.is_stale = False
        self.is_decode = is_decode
        """Whether it is known that every row computes one token, its last known one."""
        self.is_single: bool | None = True if is_decode else None
        """Whether every row computes one token, as in decoding; None until somebody asks."""
        self.seq_lens: Int32s | None = None
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
class PlanDrafts:
    """Guessed tokens that a step computes behind the last known ones.

    num_tokens: (s,) int64, how many each sampling row has
    token_ids:  (drafts,) int32, packed in that order
    """

    num_tokens: Int64s
    token_ids: Int32s = field(repr=False)

    def first(self, counts: Int64s) -> Int32s:
        """The first `counts[i]` drafts of each sampling row, packed. O(drafts)."""
        return self.token_ids[packed_runs(self.num_tokens.cumsum() - self.num_tokens, counts)]


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The rows of one step. Immutable; packed arrays are made on first access, which must come before the update.

    step:             number of the step, from 0
    rows:             (n,) int64, rows of the block tables that compute something
    num_tokens:       (n,) int64, how many tokens each computes
    starts:           (n,) int64, position of its first one
    sampling_rows:    (s,) int64, rows that need a new token from this step's logits
    sampling_sources: (s,) int64, index into `rows` of the row whose last logits to sample from
    vacated:          (v,) int64, rows that lost their sample since the plan before: it ended, was aborted or preempted
    admitted:         rows that begin or come back in this step, forks included; some may be among the vacated ones
    swaps_out, copies, swaps_in: block copies to make before the step, in this order
    drafts:           guessed tokens that are among those to compute, None if no row has any
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
    vacated: Rows
    drafts: PlanDrafts | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows that compute something; a plan may be empty."""
        return len(self.rows)

    @property
    def taken(self) -> BlockIds:
        """(t,) int64: blocks that this step handed out. They hold what their last owner left, where nothing is copied to them."""
        return np.concatenate([NO_COPIES.sources, *self.inputs.taken])

    @property
    def seq_lens(self) -> Int32s:
        """(n,) int32: context length of each row after this step, as attention takes it."""
        inputs = self.inputs
        if inputs.seq_lens is None:
            inputs.seq_lens = (self.starts + self.num_tokens).astype(np.int32)
        return inputs.seq_lens

    @property
    def is_decode(self) -> bool:
        """Whether the step is known to compute the last known token of each row, and nothing else. O(1)."""
        return self.inputs.is_decode

    @property
    def query_start_loc(self) -> Int32s:
        """(n + 1,) int32: row i's tokens stand at `query_start_loc[i]` to `query_start_loc[i + 1] - 1` when packed."""
        inputs = self.inputs
        if inputs.query_start_loc is None:
            if self._is_single:
                inputs.query_start_loc = np.arange(len(self.rows) + 1, dtype=np.int32)
            else:
                inputs.query_start_loc = np.zeros(len(self.rows) + 1, np.int32)
                np.cumsum(self.num_tokens, out=inputs.query_start_loc[1:])
        return inputs.query_start_loc

    @property
    def num_drafts(self) -> Int64s | None:
        """(s,) int64: how many of the tokens of each sampling row are guesses, its last ones; None if no row has any."""
        return None if self.drafts is None else self.drafts.num_tokens

    @property
    def logit_indices(self) -> Int64s:
        """(s + drafts,) int64: packed positions of the tokens whose logits give each sampling row its tokens.

        A row with d drafts has d + 1 of them: its last known token, then its drafts.
        """
        if self._is_single:
            return self.sampling_sources
        indices: Int64s = self.query_start_loc[self.sampling_sources + 1].astype(np.int64) - 1
        if self.drafts is not None:
            num_drafts = self.drafts.num_tokens
            indices = packed_runs(indices - num_drafts, num_drafts + 1)
        return indices

    @property
    def positions(self) -> Int64s:
        """(tokens,) int64: position of each packed token in its sequence."""
        if self._is_single:
            return self.starts
        offsets = self.starts - self.query_start_loc[:-1]
        return np.repeat(offsets, self.num_tokens) + np.arange(self.query_start_loc[-1])

    @property
    def slot_mapping(self) -> Int64s:
        """(tokens,) int64: slot into which each packed token's K/V goes. O(tokens)."""
        inputs = self.inputs
        if inputs.slot_mapping is None:
            rows = self.rows if self._is_single else np.repeat(self.rows, self.num_tokens)
            inputs.slot_mapping = inputs.require_fresh().sequences.slots(rows, self.positions)
        return inputs.slot_mapping

    @property
    def token_ids(self) -> Int32s:
        """(tokens,) int32: packed token ids; raises InvalidArgumentError for simulated prompts. O(tokens)."""
        inputs = self.inputs
        if inputs.token_ids is None:
            memory = inputs.require_fresh()
            if inputs.is_decode:
                inputs.token_ids = memory.tokens.last(self.rows, self.starts)
            elif self.drafts is None:
                inputs.token_ids = memory.tokens.packed(self.rows, self.starts, self.num_tokens)
            else:
                inputs.token_ids = self._token_ids_with(self.drafts, memory)
        return inputs.token_ids

    def _token_ids_with(self, drafts: PlanDrafts, memory: RowMemory) -> Int32s:
        """Packed token ids, drafts behind the known tokens of their row. O(tokens)."""
        drafted = drafts.num_tokens.nonzero()[0]
        sources, counts = self.sampling_sources[drafted], drafts.num_tokens[drafted]
        num_known = self.num_tokens.copy()
        num_known[sources] -= counts
        is_draft = np.zeros(int(self.query_start_loc[-1]), np.bool_)
        is_draft[packed_runs(self.query_start_loc[sources + 1] - counts, counts)] = True
        packed = np.empty(len(is_draft), np.int32)
        packed[is_draft] = drafts.token_ids
        packed[~is_draft] = memory.tokens.packed(self.rows, self.starts, num_known)
        return packed

    @property
    def _is_single(self) -> bool:
        inputs = self.inputs
        if inputs.is_single is None:
            inputs.is_single = int(np.add.reduce(self.num_tokens)) == len(self.rows)
        return inputs.is_single
