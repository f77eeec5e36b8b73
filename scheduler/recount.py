"""Counted twice: seats, rows and states recounted from the live samples, never from the counters."""

from __future__ import annotations

from collections.abc import Iterable

from pagedkv.errors import InvariantViolation
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler.client_shares import ClientShares
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample, SampleState
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["check_samples"]


def check_samples(
    live: Iterable[list[Sample]],
    config: SchedulerConfig,
    queue: WaitingQueue,
    running: RunningRows,
    *,
    memory: RowMemory,
    shares: ClientShares,
) -> None:
    """Compare the live samples, by request, with running rows, queue, shares and memory. Raises InvariantViolation.

    O(samples).
    """
    requests = list(live)
    samples = [sample for group in requests for sample in group]
    standing = shares.check(group[0] for group in requests)
    seated = [sample for sample in samples if sample.state is SampleState.RUNNING]
    rows = running.rows.tolist()
    if sorted(rows) != sorted(sample.row for sample in seated):
        raise InvariantViolation("I15", f"rows {rows[:20]} run for {len(seated)} running samples")
    if any(running.samples[sample.row] is not sample for sample in seated):
        raise InvariantViolation("I15", "a row runs for another sample than its own")
    num_seats = sum(sample.num_samples for sample in seated)
    if num_seats != running.num_seats or num_seats > config.max_num_running:
        raise InvariantViolation(
            "I15", f"{num_seats} seats taken, {running.num_seats} counted, {config.max_num_running} there"
        )
    waiting = [sample for sample in samples if sample.state in (SampleState.WAITING, SampleState.SWAPPED)]
    queued = [sample.place for sample in waiting if all(sample is not other for other in standing)]
    if sorted(queued) != [sample.place for sample in queue]:
        raise InvariantViolation("I10", f"{len(queued)} samples wait, the queue holds {len(queue)}")
    swapped = {sample.row for sample in samples if sample.state is SampleState.SWAPPED}
    if not swapped <= set(memory.host_blocks):
        raise InvariantViolation("I6", f"rows {sorted(swapped)[:20]} are swapped out without host blocks")
    for sample in seated:
        if memory.sequences.num_known[sample.row] > sample.max_tokens:
            raise InvariantViolation("I15", f"request {sample.request.request_id!r} is longer than it may be")
