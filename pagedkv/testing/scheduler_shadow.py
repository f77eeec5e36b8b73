"""A fake model whose every state depends on the whole prefix, and the slots in which a scheduler has it keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s
from pagedkv.scheduler import Request, Scheduler, StepOutcome, StepPlan

__all__ = ["VOCABULARY", "Answer", "ShadowEngine", "answers_to", "next_token", "root_state", "states_of"]

States = NDArray[np.uint64]

VOCABULARY = 50
MASK = 2**64 - 1
# Knuth's multiplier for 64-bit linear congruences; a state is odd or even by its token, so no state repeats by accident.
MULTIPLIER = 6364136223846793005
INCREMENT = 1442695040888963407
UNWRITTEN = np.uint64(0xDEAD_BEEF_DEAD_BEEF)


def root_state(request: Request) -> int:
    """The state before the first token: another one for each salt and adapter, so that what must not be shared differs."""
    owner = f"{request.salt.hex()} {request.adapter}"
    return 0 if owner == " None" else int.from_bytes(sha256(owner.encode()).digest()[:8], "little")


def states_of(tokens: Sequence[int], state: int = 0) -> list[int]:
    """The model's K/V of each token: it depends on the token and on everything before it. O(tokens)."""
    states = []
    for token in tokens:
        state = (state * MULTIPLIER + (2 * token + 1) * INCREMENT) & MASK
        states.append(state)
    return states


def next_token(state: int, sample_idx: int) -> int:
    """The token that a sample of a request continues with, whose last token has this state."""
    return ((state >> 33) + sample_idx) % VOCABULARY


@dataclass(slots=True)
class Answer:
    """What one sample of a request must answer, and what each of its slots must hold.

    token_ids: what it answers in all
    states:    (prompt + answer,) uint64, of every token that it will consist of
    num_given: tokens that it has been given so far
    """

    token_ids: list[int]
    states: States
    num_prompt: int
    num_given: int = 0
    has_ended: bool = False

    @property
    def is_given(self) -> bool:
        """Whether it has all of its tokens."""
        return self.num_given >= len(self.token_ids)


def answers_to(request: Request, *, stops_after: int | None = None) -> list[Answer]:
    """What every sample of a request must answer, computed without any cache. O(n * tokens).

    `stops_after`: the engine ends each sample after so many tokens, if nothing else has.
    """
    prompt = [int(token) for token in np.asarray(request.prompt)]
    prompt_states = states_of(prompt, root_state(request))
    stops = frozenset(int(token) for token in request.stop_token_ids)
    most = request.max_new_tokens if stops_after is None else min(request.max_new_tokens, stops_after)
    answers = []
    for sample_idx in range(request.n):
        token_ids: list[int] = []
        state, states = prompt_states[-1], list(prompt_states)
        while len(token_ids) < most and (not token_ids or token_ids[-1] not in stops):
            token_ids.append(next_token(state, sample_idx))
            state = states_of(token_ids[-1:], state)[0]
            states.append(state)
        answers.append(Answer(token_ids, np.array(states, np.uint64), len(prompt)))
    return answers


@dataclass
class ShadowEngine:
    """Carries plans out on arrays of slots. A slot that was never written, or was overwritten, spoils what is read.

    device, host: (num_blocks, block_size) uint64, the state kept in each slot
    seats:        which sample runs in a row
    roots:        the state before the first token of each request that has one of its own
    """

    scheduler: Scheduler
    roots: dict[str, int] = field(default_factory=dict)
    seats: dict[int, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory = self.scheduler.manager.memory
        self.block_size = memory.block_size
        self.device: States = np.full((memory.pool.num_blocks, self.block_size), UNWRITTEN)
        self.host: States = np.full((memory.host_pool.num_blocks, self.block_size), UNWRITTEN)
        self.slots: States = self.device.reshape(-1)

    def take_seats(self, plan: StepPlan) -> None:
        """Note who runs where from this plan on."""
        for seat in plan.admitted:
            self.seats[seat.row] = (seat.request_id, seat.sample_idx)

    def move_blocks(self, plan: StepPlan, *, at_most: int | None = None, times: int = 1) -> None:
        """Make the plan's copies in their order; only the first `at_most` of them, each list `times` over."""
        left = len(plan.swaps_out) + len(plan.copies) + len(plan.swaps_in) if at_most is None else at_most
        lists = (
            (plan.swaps_out, self.device, self.host),
            (plan.copies, self.device, self.device),
            (plan.swaps_in, self.host, self.device),
        )
        for copies, source, target in lists:
            num = min(left, len(copies))
            for _ in range(times if num else 0):
                for i in range(num):
                    target[copies.targets[i]] = source[copies.sources[i]]
            left -= num

    def spoil(self, plan: StepPlan) -> None:
        """Fail in the worst way: everything that the step was to write holds garbage."""
        self.slots[plan.slot_mapping] = UNWRITTEN
        self.device[plan.copies.targets] = UNWRITTEN
        self.device[plan.swaps_in.targets] = UNWRITTEN
        self.host[plan.swaps_out.targets] = UNWRITTEN

    def compute(self, plan: StepPlan) -> StepOutcome | list[int]:
        """Write a state into each slot of the plan, and sample: one token a row, or those that come of its drafts."""
        states = self._write(plan)
        rows, indices = plan.sampling_rows.tolist(), plan.logit_indices.tolist()
        if plan.num_drafts is None:
            return [next_token(states[i], self.seats[row][1]) for i, row in zip(indices, rows, strict=True)]
        return self._verify(plan, states, indices)

    def _write(self, plan: StepPlan) -> list[int]:
        """Every packed token's state. Rows that decode first and at once; others in order, as they may read each other's."""
        slots, tokens = plan.slot_mapping, plan.token_ids
        firsts = plan.query_start_loc[:-1]
        last = self._last_states(plan)
        new = {seat.row for seat in plan.admitted}
        is_new = np.array([row in new for row in plan.rows.tolist()], np.bool_)
        single = np.flatnonzero((plan.num_tokens == 1) & (plan.starts > 0) & ~is_new)
        packed = np.zeros(len(slots), np.uint64)
        at = firsts[single]
        packed[at] = last[single] * np.uint64(MULTIPLIER) + _steps(tokens[at])
        self.slots[slots[at]] = packed[at]
        others = np.setdiff1d(np.arange(len(plan.rows)), single, assume_unique=True)
        for i in others.tolist():
            first, count, start = int(firsts[i]), int(plan.num_tokens[i]), int(plan.starts[i])
            before = (
                int(self.slots[self._slot(plan, i)]) if start else self.roots.get(self.seats[int(plan.rows[i])][0], 0)
            )
            run = slice(first, first + count)
            packed[run] = states_of(tokens[run].tolist(), before)
            self.slots[slots[run]] = packed[run]
        states: list[int] = packed.tolist()
        return states

    def _last_states(self, plan: StepPlan) -> States:
        """(n,) what stands before the first token to compute of each row; of no meaning at a sequence's start."""
        before = np.maximum(plan.starts - 1, 0)
        blocks = self.scheduler.block_tables[plan.rows, before // self.block_size]
        states: States = self.device[blocks, before % self.block_size]
        return states

    def _slot(self, plan: StepPlan, i: int) -> int:
        """The slot before the i-th row's first token to compute."""
        block_idx, offset = divmod(int(plan.starts[i]) - 1, self.block_size)
        return int(self.scheduler.block_tables[plan.rows[i], block_idx]) * self.block_size + offset

    def _verify(self, plan: StepPlan, states: list[int], indices: list[int]) -> StepOutcome:
        """The tokens of each row up to the first that is not the draft in its place."""
        tokens = plan.token_ids.tolist()
        new: list[int] = []
        counts: list[int] = []
        num_drafts = [] if plan.num_drafts is None else plan.num_drafts.tolist()
        for row, num in zip(plan.sampling_rows.tolist(), num_drafts, strict=True):
            own, indices = indices[: num + 1], indices[num + 1 :]
            before = len(new)
            for i in own:
                new.append(next_token(states[i], self.seats[row][1]))
                if i == own[-1] or new[-1] != tokens[i + 1]:
                    break
            counts.append(len(new) - before)
        return StepOutcome(new, counts)

    def kept_states(self, row: int, num_tokens: int) -> States:
        """(num_tokens,) what the first slots of a row hold. O(num_tokens)."""
        blocks = self.scheduler.block_tables[row, : -(-num_tokens // self.block_size)]
        kept: States = self.device[blocks].reshape(-1)[:num_tokens]
        return kept


def _steps(tokens: Int32s) -> States:
    """What each token adds to the state before it, times the multiplier."""
    steps: States = (2 * tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(INCREMENT)
    return steps
