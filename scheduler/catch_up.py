"""What the running rows compute in a step: each catches up with its known tokens, under one token budget."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int64s, Rows
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.admission import Admission
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.shortage import Shortage
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["CatchUp"]

NO_ROWS = np.empty(0, np.int64)


class CatchUp:
    """Gives the running rows their tokens and blocks, preempting until the blocks suffice.

    `is_decode`: whether every row that was planned last computes one token, its last known one.
    """

    __slots__ = ("_admission", "_config", "_memory", "_queue", "_running", "_shortage", "is_decode")

    def __init__(
        self,
        config: SchedulerConfig,
        memory: RowMemory,
        queue: WaitingQueue,
        running: RunningRows,
        *,
        admission: Admission,
        shortage: Shortage,
    ) -> None:
        self._config = config
        self._memory = memory
        self._queue = queue
        self._running = running
        self._admission = admission
        self._shortage = shortage
        self.is_decode = False

    def plan(self, *, now: float, step: int) -> tuple[Rows, Int64s, Int64s, BlockCopies]:
        """Rows, first position and number of tokens of each, and the copies to make first; in order of admission.

        A fixed number of array operations over the running rows, and a smaller one for each victim.
        """
        memory = self._memory
        table = memory.sequences
        self.is_decode = False
        while True:
            rows = self._running.rows
            if not len(rows):
                return NO_ROWS, NO_ROWS, NO_ROWS, NO_COPIES
            starts = table.num_computed[rows]
            num_tokens = table.num_known[rows] - starts
            num_wanted = int(np.add.reduce(num_tokens))
            self.is_decode = num_wanted == len(rows)
            if self.is_decode:
                copies = memory.try_append_single(rows, starts)
            else:
                # Something more than a decode is under way, so the blocks that it names may let a waiting request in.
                self._admission.is_open = True
                if num_wanted > self._config.max_num_batched_tokens or self._config.long_prefill_tokens is not None:
                    rows, starts, num_tokens = self._share_budget(rows, starts, num_tokens)
                copies = memory.try_append(rows, num_tokens)
            if copies is not None:
                return rows.copy(), starts, num_tokens, copies
            self._preempt(rows, table.num_blocks_to_append(rows, num_tokens), now=now, step=step)
            self._admission.is_open = True

    def _preempt(self, rows: Rows, num_blocks: Int64s, *, now: float, step: int) -> None:
        """Take the seat of a victim, `rows` needing `num_blocks[i]` each; of more where it is sure that they are needed.

        In a decode the others need what they need whoever goes, so nothing is planned anew before their blocks are there.
        Otherwise the victim's tokens may go to others, and a prompt may be capped for its sake. O(running) for each victim.
        """
        blocks_of = np.zeros(len(self._memory.sequences.num_blocks), np.int64)
        blocks_of[rows] = num_blocks  # Now: the rows are a view of those that run.
        num_needed = int(np.add.reduce(num_blocks))
        while True:
            row = self._shortage.preempt(num_needed, now=now, step=step)
            num_needed -= blocks_of.item(row)
            if not self.is_decode or num_needed <= self._memory.pool.num_available:
                return

    def give_rest(self, rows: Rows, starts: Int64s, num_tokens: Int64s) -> BlockCopies:
        """Where one row alone had more to compute than a token, the cap protects nobody: it gets what the step has left.

        Only after admission is it known that those who wait cannot use the budget. Adds to `num_tokens` in place, and
        returns the copies to make first; gives nothing if blocks are short for it. O(rows) array operations.
        """
        if self._config.long_prefill_tokens is None:
            return NO_COPIES
        wanted = self._memory.sequences.num_known[rows] - starts
        prompts = (wanted > 1).nonzero()[0]
        if len(prompts) != 1:
            return NO_COPIES
        (i,) = prompts.tolist()
        num_left = self._config.max_num_batched_tokens - int(np.add.reduce(num_tokens))
        num_more = min(num_left, int(wanted[i] - num_tokens[i]))
        copies = self._memory.try_append_run(int(rows[i]), num_more) if num_more else None
        if copies is None:
            return NO_COPIES
        num_tokens[i] += num_more
        return copies

    def _share_budget(self, rows: Rows, starts: Int64s, wanted: Int64s) -> tuple[Rows, Int64s, Int64s]:
        """Cut what the rows want to compute to the token budget, in order, and to the cap for long prompts.

        Who wants one token gets it, wherever it stands: there is one for each, and a prompt that was admitted before it
        would otherwise take the whole budget, step after step.
        """
        cap = self._config.long_prefill_tokens
        if cap is not None and np.count_nonzero(wanted > 1) + len(self._queue) > 1:
            wanted = np.minimum(wanted, cap)
        is_single = wanted == 1
        longer = np.where(is_single, 0, wanted)
        num_left = self._config.max_num_batched_tokens - np.count_nonzero(is_single)
        shared = (num_left - longer.cumsum() + longer).clip(0, longer) + is_single
        if shared.all():
            return rows, starts, shared
        gets_some = shared > 0
        return rows[gets_some], starts[gets_some], shared[gets_some]
