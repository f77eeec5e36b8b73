"""How one step is planned: rows catch up, others are admitted, some need a token; and how it is taken back if it fails."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int64s, Rows
from pagedkv.plans import NO_COPIES
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.admission import Admission, Grants
from pagedkv.scheduler.catch_up import NO_ROWS, CatchUp
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.drafts import Drafting, Guesses
from pagedkv.scheduler.plan import PlanInputs, Seat, StepPlan
from pagedkv.scheduler.rollback import retract_step
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.sampling import Sampling
from pagedkv.scheduler.shortage import Shortage
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["StepPlanner"]

NO_GRANTS = Grants()
NOTHING_CAUGHT_UP = (NO_ROWS, NO_ROWS, NO_ROWS, NO_COPIES)


class StepPlanner:
    """Puts one plan together, and remembers what it gave to whom, so that a step that fails can be taken back.

    Running rows come first; what budget they leave over goes to waiting requests, then to a lone prompt beyond its cap; what
    room all of them leave, to drafts.
    """

    __slots__ = (
        "_admission",
        "_admission_interval",
        "_catch_up",
        "_caught_up",
        "_drafting",
        "_grants",
        "_memory",
        "_next_admission",
        "_queue",
        "_running",
        "_sampling",
        "_shortage",
        "_token_budget",
        "_unannounced",
    )

    def __init__(
        self,
        config: SchedulerConfig,
        memory: RowMemory,
        queue: WaitingQueue,
        running: RunningRows,
        *,
        admission: Admission,
        shortage: Shortage,
        sampling: Sampling,
        drafting: Drafting,
    ) -> None:
        self._admission_interval = config.admission_interval
        self._next_admission = 0
        self._token_budget = config.max_num_batched_tokens
        self._memory = memory
        self._queue = queue
        self._running = running
        self._admission = admission
        self._shortage = shortage
        self._catch_up = CatchUp(config, memory, queue, running, admission=admission, shortage=shortage)
        self._sampling = sampling
        self._drafting = drafting
        self._caught_up = NOTHING_CAUGHT_UP
        self._grants = NO_GRANTS
        self._unannounced: list[Sample] = []

    def begin_step(self) -> None:
        """Forget the step before: it was carried out, or taken back. O(1)."""
        self._memory.begin_step()
        self._shortage.begin_step()
        self._sampling.forked.clear()
        self._caught_up, self._grants = NOTHING_CAUGHT_UP, NO_GRANTS

    def plan(self, guesses: Guesses | None, *, now: float, step: int) -> StepPlan:
        """Plan the step that was begun. O(running) array operations. If it raises, the step is to be taken back."""
        self._caught_up = rows, starts, num_tokens, copies = self._catch_up.plan(now=now, step=step)
        grants = NO_GRANTS
        # Where nothing runs, somebody else who uses the same memory may have let go of blocks, and nobody tells.
        may_admit = (self._admission.is_open and not self.num_steps_closed(step)) or not len(rows)
        # A step that preempts admits nobody: no row of its plan can then be a victim of it, or come back in it.
        if may_admit and len(self._queue) and not self._shortage.preempted:
            grants = self._grants = Grants()
            is_short_of_tokens = self._admit(rows, starts, num_tokens, now=now, step=step)
            if grants.rows:
                # Whoever waits for token budget alone is admitted by the very next steps: the interval begins behind them.
                self._next_admission = step + (1 if is_short_of_tokens else self._admission_interval)
                rows = np.concatenate((rows, np.array(grants.rows)))
                starts = np.concatenate((starts, np.array(grants.starts)))
                num_tokens = np.concatenate((num_tokens, np.array(grants.num_tokens)))
                copies += grants.copies
        is_decode = self._catch_up.is_decode and not grants.rows
        if not is_decode:
            copies += self._catch_up.give_rest(rows, starts, num_tokens)
        if is_decode and self._sampling.is_plain:
            sampling_rows, sources = rows, np.arange(len(rows))
        else:
            sampling_rows, sources = self._sampling.choose(rows, starts + num_tokens)
        granted = None
        if guesses is not None and not self._shortage.preempted:
            forking = {first.row for first, _ in self._sampling.forked}
            granted = self._drafting.plan(guesses, num_tokens, sampling_rows, sources, forking=forking)
            if granted is not None:
                # Sources occur twice only where samples fork, which have no drafts.
                num_tokens[sources] += granted.num_tokens
        return StepPlan(
            step=step,
            rows=rows,
            num_tokens=num_tokens,
            starts=starts,
            sampling_rows=sampling_rows,
            sampling_sources=sources,
            admitted=self._admitted_seats(),
            swaps_out=self._shortage.swaps_out,
            copies=copies,
            swaps_in=grants.swaps_in,
            inputs=PlanInputs(self._memory, self._memory.end_planning(), is_decode=is_decode and granted is None),
            vacated=self._running.take_vacated(),
            drafts=granted,
        )

    def num_steps_closed(self, step: int) -> int:
        """How many steps, from `step` on, admit nobody as long as anything runs, because one before them did. O(1)."""
        return max(0, self._next_admission - step)

    def take_back(self, seated_rows: list[int]) -> int:
        """Retract all rows of the step that was not carried out; returns how many it had. O(rows + blocks).

        Rows that were seated by it stay so, and the next plan names them among the admitted ones.
        """
        rows, starts, _, copies = self._caught_up
        grants = self._grants
        retract_step(
            np.concatenate((rows, np.array(grants.rows, np.int64))),
            np.concatenate((starts, np.array(grants.starts, np.int64))),
            copies + grants.copies,
            grants.swapped_in,
            memory=self._memory,
            running=self._running,
        )
        self._shortage.forget_swaps()
        seated = (self._running.samples[row] for row in seated_rows)
        self._unannounced = [sample for sample in seated if sample is not None]
        return len(rows) + len(grants.rows)

    def seated_rows(self) -> list[int]:
        """Rows that no plan has named among the admitted ones yet: of this step, and of failed ones before it."""
        before = [sample.row for sample in self._unannounced if sample.state is SampleState.RUNNING]
        return [*before, *self._grants.rows]

    def _admit(self, rows: Rows, starts: Int64s, num_tokens: Int64s, *, now: float, step: int) -> bool:
        table = self._memory.sequences
        num_planned = int(np.add.reduce(num_tokens))
        num_promised = num_prefilling = 0
        if not self._catch_up.is_decode:  # However few tokens each of them computes.
            known = table.num_known[rows]
            num_promised = int(np.add.reduce(-(-known // table.block_size) - table.num_blocks[rows]))
            num_prefilling = int(np.count_nonzero(known > starts + num_tokens))
        budget = self._token_budget - num_planned
        return self._admission.admit(self._grants, budget, num_promised, num_prefilling, now=now, step=step)

    def _admitted_seats(self) -> tuple[Seat, ...]:
        """Rows that begin or come back in this step, or did so in one that failed."""
        forked = self._sampling.forked
        if not self._grants.rows and not forked and not self._unannounced:
            return ()
        samples = [self._running.samples[row] for row in self._grants.rows] + [sibling for _, sibling in forked]
        again = [sample for sample in self._unannounced if sample.state is SampleState.RUNNING]
        self._unannounced = []
        return tuple(Seat(sample.row, sample.request.request_id, sample.sample_idx) for sample in again + samples)
