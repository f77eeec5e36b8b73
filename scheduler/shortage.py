"""What happens when the running samples need more blocks than there are: victims lose their seats."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Rows
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.events import Event, Preempted
from pagedkv.scheduler.order import VictimPolicy
from pagedkv.scheduler.preemption import PreemptionMode, PreemptionPolicy
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["Shortage"]


class Shortage:
    """Takes one seat at a time, until the caller has blocks enough; the victim goes back to its place in the queue.

    `preempted` are the victims of the step being planned, `swaps_out` the copies that move some of them to the host.
    """

    __slots__ = ("_events", "_memory", "_preemption", "_queue", "_running", "_victim", "preempted", "swaps_out")

    def __init__(
        self,
        memory: RowMemory,
        queue: WaitingQueue,
        running: RunningRows,
        *,
        victim: VictimPolicy,
        preemption: PreemptionPolicy,
        events: deque[Event],
    ) -> None:
        self._memory = memory
        self._queue = queue
        self._running = running
        self._victim = victim
        self._preemption = preemption
        self._events = events
        self.begin_step()

    def begin_step(self) -> None:
        """Nobody was preempted yet."""
        self.preempted: list[Sample] = []
        self.swaps_out: BlockCopies = NO_COPIES

    def preempt(self, num_needed: int, *, now: float, step: int) -> int:
        """Take the seat of one victim, and return the row that it had. `num_needed` blocks were asked for, which is told.

        O(running + blocks).
        """
        memory = self._memory
        sample = self._choose()
        row = sample.row
        num_used, num_computed = memory.pool.num_used, int(memory.sequences.num_computed[row])
        mode = self._preemption.choose(self._num_lost(sample), int(memory.sequences.num_blocks[row]))
        copies = memory.try_swap_out(row) if mode is PreemptionMode.SWAP and num_computed else None
        sample.num_known = int(memory.sequences.num_known[row])
        sample.num_preemptions += 1
        self._running.remove(sample)
        if copies is None:
            mode = PreemptionMode.RECOMPUTE
            memory.close(row)
            sample.row = -1
            sample.state = SampleState.WAITING
        else:
            self.swaps_out += copies
            sample.state = SampleState.SWAPPED
        self._queue.push(sample)
        self.preempted.append(sample)
        self._events.append(
            Preempted(
                time=now,
                step=step,
                request_id=sample.request.request_id,
                sample_idx=sample.sample_idx,
                mode=mode.value,
                num_computed_tokens=num_computed,
                num_used_before=num_used,
                num_used_after=memory.pool.num_used,
                num_needed_blocks=num_needed,
                reason="running requests need blocks",
            )
        )
        return row

    def forget_swaps(self) -> None:
        """The step failed and no copy was made: those that it was to swap out start over. O(victims log waiting)."""
        for sample in self.preempted:
            if sample.state is SampleState.SWAPPED:
                self._memory.close(sample.row)
                sample.row = -1
                sample.state = SampleState.WAITING

    def _num_lost(self, sample: Sample) -> int:
        """Tokens that must be computed again if the sample forgets its blocks: not those of named blocks that others hold.

        Who holds a named block holds those before it, so what others hold, they hold from the start. O(blocks).
        """
        memory, row = self._memory, sample.row
        num_computed = int(memory.sequences.num_computed[row])
        if not sample.request.reads_cache:
            return num_computed
        named = memory.sequences.blocks(row)[: int(memory.sequences.num_named[row])]
        return num_computed - int(np.count_nonzero(memory.pool.counts(named) > 1)) * memory.block_size

    def _choose(self) -> Sample:
        """The victim policy's choice among those that give a block back and have filled one since they came back.

        If there are none, among those that at least give one back, then among the others. Settled ones are spared:
        admission has seen to it that their blocks suffice for all of them. They can be the only ones left where somebody
        else uses the same memory; then one of them goes all the same, or nobody would get on.
        """
        running, rows = self._running, self._running.rows
        is_unsettled = ~running.is_settled[rows]
        is_unprotected = is_unsettled & (self._memory.sequences.num_known[rows] >= running.protected_until[rows])
        gives_back = self._gives_back(rows)
        candidates = rows[is_unprotected & gives_back]
        if not len(candidates):
            tiers = (is_unsettled & gives_back, is_unprotected, is_unsettled)
            candidates = next((rows[tier] for tier in tiers if tier.any()), rows)
        choice = self._victim.choose(running.ranks[candidates], running.serials[candidates])
        sample: Sample = running.samples[candidates[choice]]
        return sample

    def _gives_back(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether each row is the only holder of a block, (n,) bool: of its last one, for whoever shares that shares all."""
        table = self._memory.sequences
        num_blocks = table.num_blocks[rows]
        last = table.blocks_at(rows, np.maximum(num_blocks, 1) - 1)
        is_alone: NDArray[np.bool_] = (self._memory.pool.counts(last) == 1) & (num_blocks > 0)
        return is_alone
