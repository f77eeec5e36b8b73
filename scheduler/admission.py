"""Admission: which waiting samples get a seat in this step, and why the others do not."""

from __future__ import annotations

from collections import deque

from pagedkv.arrays import cdiv
from pagedkv.errors import InvariantViolation
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.events import Admitted, Deferred, Event
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["Admission", "Grants"]


class Grants:
    """What admission added to the step."""

    __slots__ = ("copies", "num_tokens", "rows", "starts", "swapped_in", "swaps_in")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.num_tokens: list[int] = []
        self.starts: list[int] = []
        self.copies = NO_COPIES
        self.swaps_in = NO_COPIES
        self.swapped_in: list[tuple[int, int]] = []
        """(row, tokens that were still on the device) of the samples that came back from the host."""


class Admission:
    """Admits from the front of the queue while seats, token budget and blocks last.

    A sample gets in if its whole prompt fits beside what was promised to prompts under way, and a watermark of blocks
    stays available, unless nothing runs. One for which seats, blocks, or without chunks the tokens that decodes leave are
    too few lets at most `max_bypasses` later ones pass, over all its time in the queue, then nobody; since no one joins
    behind it any more, running samples drain until it fits. Nobody passes one that lacks only what others were given of
    the same step: the next one begins with it.

    A sample that was preempted `max_preemptions` times is *settled* when it comes back: it keeps its seat until it ends.
    It gets in only if all blocks that it may ever need, and those of the other settled ones, make up no more than the
    pool: whatever is short later, there is somebody else to take it from, or nobody needs it.

    `is_open` is False after an attempt that ended for want of seats or blocks, until something is added or let go of:
    decoding only makes both scarcer, so trying again would end alike. This is also what lets a simulator leap.
    """

    __slots__ = (
        "_config",
        "_events",
        "_memory",
        "_queue",
        "_running",
        "_watermark_blocks",
        "is_open",
    )

    def __init__(
        self,
        config: SchedulerConfig,
        memory: RowMemory,
        queue: WaitingQueue,
        running: RunningRows,
        events: deque[Event],
    ) -> None:
        self._config = config
        self._memory = memory
        self._queue = queue
        self._running = running
        self._events = events
        self._watermark_blocks = int(config.watermark * memory.pool.num_blocks)
        self.is_open = True

    def admit(
        self, grants: Grants, budget: int, num_promised: int, num_prefilling: int, *, now: float, step: int
    ) -> bool:
        """Admit what fits into `budget` tokens, into `grants`. `num_promised` blocks belong to the rest of prompts under way.

        Returns whether somebody was left for want of tokens that others were given: the next step is to begin with it.
        O(log blocks) for each admitted and passed one, and the blocks of those admitted. If it raises, `grants` holds what
        was admitted before.
        """
        queue, running, max_running = self._queue, self._running, self._config.max_num_running
        blocked: list[Sample] = []
        budget_left = budget
        self.is_open = False
        while len(queue) > len(blocked) and self._may_pass(blocked):
            sample = queue.nth(len(blocked))
            if running.num_seats + sample.num_samples > max_running:
                reason = "no seat"
                nobody_passes = running.num_seats == max_running
            elif not (chunk := self._chunk(sample, budget_left, num_prefilling)):
                reason = "no token budget"
                self.is_open = True
                # What others were given of this step, it gets of the next one. What decodes take, it may never get.
                nobody_passes = not budget_left or self._chunk(sample, budget, num_prefilling) > 0
            elif not self._try_admit(sample, chunk, num_promised, grants, now, step):
                reason = "no blocks"
                nobody_passes = False
            else:
                budget_left -= grants.num_tokens[-1]
                known, stop = sample.num_known, grants.starts[-1] + grants.num_tokens[-1]
                num_prefilling += 1 if stop < known else 0
                num_promised += cdiv(known, self._memory.block_size) - cdiv(stop, self._memory.block_size)
                for passed in blocked:
                    passed.num_bypasses += 1
                    self.is_open = True  # What was admitted may have named blocks that those passed can hit.
                continue
            self._defer(sample, reason, now, step)
            if nobody_passes:
                return reason == "no token budget"
            blocked.append(sample)
        return False

    def _may_pass(self, blocked: list[Sample]) -> bool:
        """Whether others may be admitted before these, which do not fit. O(max_bypasses)."""
        max_bypasses = self._config.max_bypasses
        return len(blocked) <= max_bypasses and all(sample.num_bypasses < max_bypasses for sample in blocked)

    def _chunk(self, sample: Sample, budget: int, num_prefilling: int) -> int:
        """How many tokens the sample may compute in this step, if all of its known ones are to be computed; 0: none."""
        config = self._config
        cap = config.long_prefill_tokens
        if cap is not None and num_prefilling + len(self._queue) > 1:
            budget = min(budget, cap)
        if not config.chunked_prefill and sample.state is SampleState.WAITING and sample.num_known > budget:
            memory, num_lacking = self._memory, cdiv(sample.num_known - budget, self._memory.block_size)
            num_hit = self._num_hit(sample)
            # Listed only if they suffice: then they may be fewer, where simulated ids contradict each other.
            if num_hit < num_lacking or len(memory.hit_blocks(sample.content, num_hit)) < num_lacking:
                return 0
        return budget

    def _try_admit(self, sample: Sample, chunk: int, num_promised: int, grants: Grants, now: float, step: int) -> bool:
        memory = self._memory
        is_swapped = sample.state is SampleState.SWAPPED
        resumed = sample.num_preemptions > 0
        is_settled = sample.num_preemptions >= self._config.max_preemptions
        if is_settled and not self._fits_with_settled(sample):
            return False
        start = (self._swap_in if is_swapped else self._open)(sample, num_promised, grants)
        if start < 0:
            return False
        num_tokens = min(sample.num_known - start, chunk)
        try:
            copies = memory.try_append_run(sample.row, num_tokens)
        except BaseException:
            self._start_over(sample)
            raise
        if copies is None:
            self._start_over(sample)
            raise InvariantViolation(
                "I11", f"admission of {sample.request.request_id!r} counted blocks that are not there"
            )
        if not is_swapped:
            memory.counters.record(sample.num_known, start // memory.block_size, memory.block_size, resumed=resumed)
        grants.copies += copies
        grants.rows.append(sample.row)
        grants.num_tokens.append(num_tokens)
        grants.starts.append(start)
        self._queue.remove(sample)
        # A sample that came back keeps its seat until it has filled one more block: otherwise two samples could
        # throw each other out in turn, and each turn costs a prefill.
        protected_until = sample.num_known + memory.block_size if resumed else 0
        self._running.add(sample, protected_until=protected_until, is_settled=is_settled)
        sample.deferral = ""
        mode = "swapped in" if is_swapped else "recomputed" if resumed else "new"
        used = memory.pool.num_used
        request_id = sample.request.request_id
        self._events.append(Admitted(now, step, request_id, sample.sample_idx, mode, sample.num_known, start, used))
        return True

    def _open(self, sample: Sample, num_promised: int, grants: Grants) -> int:  # noqa: ARG002 - same shape as _swap_in
        """Make a row for a waiting sample; returns its first position to compute, or -1 if blocks are short."""
        memory = self._memory
        num_blocks = cdiv(sample.num_known, memory.block_size) + num_promised
        num_hit = self._num_hit(sample)
        if not self._fits(num_blocks - num_hit):  # Before the hits are listed: an overloaded step asks this in vain.
            return -1
        hit_blocks = memory.hit_blocks(sample.content, num_hit)
        num_hit = len(hit_blocks)  # Fewer where simulated ids contradict each other.
        num_needed = num_blocks - num_hit
        if not self._fits(num_needed + num_hit) and not self._fits(
            num_needed + memory.pool.num_evictable_among(hit_blocks)
        ):
            return -1
        sample.row = memory.open(sample.content, sample.num_known, hit_blocks)
        return num_hit * memory.block_size

    def _num_hit(self, sample: Sample) -> int:
        """Blocks of the prefix cache with which a waiting sample would begin, 0 if it does not read it. O(log blocks)."""
        return self._memory.num_hit_blocks(sample.content, sample.num_known) if sample.request.reads_cache else 0

    def _swap_in(self, sample: Sample, num_promised: int, grants: Grants) -> int:
        """Bring a swapped sample back; returns its first position to compute, or -1 if blocks are short."""
        memory = self._memory
        num_computed = int(memory.sequences.num_computed[sample.row])
        num_later = cdiv(sample.num_known, memory.block_size) - cdiv(num_computed, memory.block_size)
        if not self._fits(memory.num_blocks_to_swap_in(sample.row) + num_later + num_promised):
            return -1
        copies: BlockCopies | None = memory.try_swap_in(sample.row)
        if copies is None:
            raise InvariantViolation(
                "I11", f"swap in of {sample.request.request_id!r} counted blocks that are not there"
            )
        grants.swaps_in += copies
        num_copied = len(copies) * memory.block_size
        grants.swapped_in.append(
            (sample.row, max(0, cdiv(num_computed, memory.block_size) * memory.block_size - num_copied))
        )
        return num_computed

    def _start_over(self, sample: Sample) -> None:
        """Its admission failed halfway, with the step: it waits on, without what it may have had on the host."""
        self._memory.close(sample.row)
        sample.row = -1
        sample.state = SampleState.WAITING

    def _fits_with_settled(self, sample: Sample) -> bool:
        """Whether the pool holds it and the settled samples that run, each with all blocks that it may ever need."""
        settled = (sample, *self._running.settled())
        num_blocks = sum(cdiv(other.num_slots, self._memory.block_size) for other in settled)
        return num_blocks <= self._memory.pool.num_blocks

    def _fits(self, num_blocks: int) -> bool:
        reserve = self._watermark_blocks if len(self._running) else 0
        return num_blocks + reserve <= self._memory.pool.num_available

    def _defer(self, sample: Sample, reason: str, now: float, step: int) -> None:
        if sample.deferral != reason:
            sample.deferral = reason
            self._events.append(Deferred(now, step, sample.request.request_id, reason))
