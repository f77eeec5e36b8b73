"""A toy engine whose answers show whether every slot held what it should."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, StepOutcome, StepPlan

# Tests are imported without a package around them; small_scheduler is found beside this file.
sys.path.append(str(Path(__file__).parent))

VOCABULARY = 50


def mix(state: int, token: int) -> int:
    """The toy model's K/V of a token: it depends on the token and on everything before it."""
    return (state * 6364136223846793005 + token * 1442695040888963407 + 1) % 2**61


def continue_prompt(prompt: list[int], num_new: int, sample_idx: int = 0) -> list[int]:
    """What the toy model answers, computed without any cache."""
    state, tokens, answer = 0, list(prompt), []
    for token in tokens:
        state = mix(state, token)
    for _ in range(num_new):
        token = (state + sample_idx) % VOCABULARY
        answer.append(token)
        state = mix(state, token)
    return answer


class ToyEngine:
    """Carries plans out on a flat array of slots. A slot that was never written, or was overwritten, spoils the answer."""

    def __init__(self, scheduler: Scheduler) -> None:
        memory = scheduler.manager.memory
        self.scheduler = scheduler
        self.block_size = memory.block_size
        self.device = np.full((memory.pool.num_blocks, self.block_size), -1, np.int64)
        self.host = np.full((memory.host_pool.num_blocks, self.block_size), -1, np.int64)
        self.seats: dict[int, tuple[str, int]] = {}

    def move_blocks(self, plan: StepPlan) -> None:
        for source, target in zip(plan.swaps_out.sources, plan.swaps_out.targets, strict=True):
            self.host[target] = self.device[source]
        for source, target in zip(plan.copies.sources, plan.copies.targets, strict=True):
            self.device[target] = self.device[source]
        for source, target in zip(plan.swaps_in.sources, plan.swaps_in.targets, strict=True):
            self.device[target] = self.host[source]

    def spoil(self, plan: StepPlan) -> None:
        """Fail in the worst way: everything that the step was to write holds garbage."""
        self.device.reshape(-1)[plan.slot_mapping] = -7
        self.device[plan.copies.targets] = -7
        self.device[plan.swaps_in.targets] = -7
        self.host[plan.swaps_out.targets] = -7

    def run(self, plan: StepPlan) -> list[int] | StepOutcome:
        """Return one token for each sampling row; with drafts, those that the model agrees with and one more."""
        self.seats |= {seat.row: (seat.request_id, seat.sample_idx) for seat in plan.admitted}
        self.move_blocks(plan)
        slots, tokens = plan.slot_mapping, plan.token_ids
        device = self.device.reshape(-1)
        states: list[int] = []
        packed = 0
        # All rows write before any row's later reads, as the layers of a model do; in row order, a row may read what an
        # earlier row of the same step has written.
        for row, num_tokens, start in zip(plan.rows, plan.num_tokens, plan.starts, strict=True):
            state = 0
            if start:
                block = self.scheduler.block_tables[row, (start - 1) // self.block_size]
                state = int(self.device[block, (start - 1) % self.block_size])
            for _ in range(num_tokens):
                state = mix(state, int(tokens[packed]))
                device[slots[packed]] = state
                packed += 1
                states.append(state)
        if plan.num_drafts is None:
            assert list(plan.logit_indices) == [int(plan.query_start_loc[i + 1]) - 1 for i in plan.sampling_sources]
            rows = plan.sampling_rows.tolist()
            return [self.sample(states[i], row) for i, row in zip(plan.logit_indices, rows, strict=True)]
        return self.verify(plan, tokens, states)

    def sample(self, state: int, row: int) -> int:
        return (state + self.seats[row][1]) % VOCABULARY

    def verify(self, plan: StepPlan, tokens: np.ndarray, states: list[int]) -> StepOutcome:
        """The tokens of each row up to the first that is not the draft in its place."""
        new: list[int] = []
        counts: list[int] = []
        indices = plan.logit_indices.tolist()
        for row, num_drafts in zip(plan.sampling_rows.tolist(), plan.num_drafts.tolist(), strict=True):
            own, indices = indices[: num_drafts + 1], indices[num_drafts + 1 :]
            before = len(new)
            for i in own:
                new.append(self.sample(states[i], row))
                if i == own[-1] or new[-1] != tokens[i + 1]:
                    break
            counts.append(len(new) - before)
        assert not indices
        return StepOutcome(new, counts)


@dataclass
class Service:
    """A scheduler with a toy engine and what it has answered so far."""

    scheduler: Scheduler
    engine: ToyEngine
    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    clock: float = 0.0

    def add(self, request: Request) -> None:
        self.scheduler.add(request, self.clock)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule(self.clock)
        self.finish(plan)
        return plan

    def finish(self, plan: StepPlan) -> None:
        tokens = self.engine.run(plan)
        self.clock += 1.0
        for output in self.scheduler.update(plan, tokens, self.clock).outputs:
            self.answers.setdefault((output.request_id, output.sample_idx), []).append(output.token_id)

    def run(self, max_steps: int = 5000) -> int:
        """Step until nothing is left to do; returns the number of steps."""
        for num_steps in range(max_steps):
            if not self.scheduler.has_work:
                return num_steps
            self.step()
            self.scheduler.check_invariants()
        raise AssertionError(f"still at work after {max_steps} steps")


@pytest.fixture
def make_service():
    def make(config, *, num_blocks=64, block_size=4, num_host_blocks=0, prefix_caching=True, eviction=None, **policies):
        cache = CacheConfig(num_blocks, block_size, num_host_blocks, prefix_caching)
        scheduler = Scheduler(config, KVCacheManager(cache, eviction=eviction), **policies)
        return Service(scheduler, ToyEngine(scheduler))

    make.continue_prompt = continue_prompt
    make.mix = mix
    return make
