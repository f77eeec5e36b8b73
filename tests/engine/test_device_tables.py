"""The device's block tables say what the scheduler's say, and are told no more than what changed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.engine.device import DeviceBlockTables
from pagedkv.scheduler import Event, Recompute, Request, Scheduler, SchedulerConfig, StepOutcome, StepPlan, Swap


class Preemptions:
    """Counts preemptions."""

    def __init__(self) -> None:
        self.num = 0

    def emit(self, event: Event) -> None:
        self.num += type(event).__name__ == "Preempted"


def make_scheduler(
    num_blocks: int,
    *,
    block_size: int = 2,
    num_host_blocks: int = 0,
    budget: int = 16,
    seats: int = 8,
    sink: Preemptions | None = None,
) -> Scheduler:
    manager = KVCacheManager(CacheConfig(num_blocks, block_size=block_size, num_host_blocks=num_host_blocks))
    preemption = Swap() if num_host_blocks else Recompute()
    return Scheduler(SchedulerConfig(budget, seats), manager, preemption=preemption, sink=sink)


def assert_equal(tables: DeviceBlockTables, plan: StepPlan, scheduler: Scheduler) -> None:
    device = tables.tables.numpy()
    for row, length in zip(plan.rows.tolist(), plan.seq_lens.tolist(), strict=True):
        used = slice(0, -(-length // tables.block_size))
        assert device[row, used].tolist() == scheduler.block_tables[row, used].tolist()


@pytest.mark.parametrize("num_host_blocks", [0, 40], ids=["recompute", "swap"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_of_a_plan_are_equal_whatever_became_of_the_steps_before(seed: int, num_host_blocks: int) -> None:
    """Preemption, forks with copies on write, drafts taken back, aborts, failed steps, and steps that were passed over."""
    rng = np.random.default_rng(seed)
    preemptions = Preemptions()
    scheduler = make_scheduler(24, num_host_blocks=num_host_blocks, sink=preemptions)
    tables = DeviceBlockTables(2, "cpu")
    seen: Counter[str] = Counter()
    live: list[str] = []
    for step in range(300):
        if len(live) < 7 and rng.random() < 0.4:
            live.append(f"r{step}")
            prompt = rng.integers(1, 3, rng.integers(1, 12)).tolist()  # two tokens: prefixes are often shared
            scheduler.add(Request(live[-1], prompt, int(rng.integers(1, 14)), n=int(rng.choice([1, 1, 2, 3]))), step)
        guesses = {row: [1, 1, 1] for row in scheduler.running_rows.tolist() if rng.random() < 0.3}
        plan = scheduler.schedule(step, guesses)
        seen["forks"] += sum(seat.sample_idx > 0 for seat in plan.admitted)
        seen["copies"] += len(plan.copies)
        fate = rng.choice(["done", "failed before", "failed after", "aborted"], p=[0.82, 0.06, 0.06, 0.06])
        if fate != "failed before":
            tables.update(plan, scheduler.block_tables)
            assert_equal(tables, plan, scheduler)
        if fate.startswith("failed"):
            seen["failures"] += 1
            scheduler.fail(plan, step)
            continue
        counts = np.ones(len(plan.sampling_rows), np.int64)
        if plan.num_drafts is not None:
            counts += rng.integers(0, plan.num_drafts + 1)
            seen["drafts taken back"] += int((counts <= plan.num_drafts).sum())
        if fate == "aborted" and live:
            scheduler.abort(live.pop(), step)
        outcome = StepOutcome([1] * int(counts.sum()), num_tokens=counts)
        scheduler.update(plan, outcome, step)
        live = [name for name in live if name in scheduler._live]
    seen["preemptions"] = preemptions.num
    assert all(seen[name] >= 3 for name in ("forks", "copies", "failures", "drafts taken back", "preemptions")), seen


def test_a_decode_step_sends_the_blocks_that_it_began() -> None:
    scheduler = make_scheduler(64, block_size=4)
    tables = DeviceBlockTables(4, "cpu")
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6, 7, 8]), ("c", [9] * 6)):
        scheduler.add(Request(name, prompt, 6), 0.0)

    sent = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        sent.append(tables.update(plan, scheduler.block_tables))
        scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)

    # Blocks 1 + 2 + 2 of the prompts, but for block 0, which is what a new table holds; then the 5th token of "a", the 9th
    # of "c", and the 9th of "b".
    assert sent == [4, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("passes_over", [False, True])
def test_a_row_given_to_another_sequence_is_compared_from_its_first_block(passes_over: bool) -> None:
    """Also if the plan that gave it was passed over. The third prompt begins with the blocks of the first."""
    scheduler = make_scheduler(8, seats=1)
    tables = DeviceBlockTables(2, "cpu")
    for name, prompt, num_new in (("a", [1, 2, 3, 4], 1), ("b", [5, 6, 7, 8], 1), ("c", [1, 2, 3, 4, 9], 2)):
        scheduler.add(Request(name, prompt, num_new), 0.0)

    found = []
    for step in range(4):
        plan = scheduler.schedule(0.0)
        if step != 2 or not passes_over:
            tables.update(plan, scheduler.block_tables)
        found.append((plan.rows.tolist(), plan.starts.tolist(), tables.gather(plan.rows, 3).tolist()))
        scheduler.update(plan, [9], 0.0)

    assert found[:2] == [([0], [0], [[0, 1, 0]]), ([0], [0], [[2, 3, 0]])]
    assert found[2] == ([0], [4], [[2, 3, 0]] if passes_over else [[0, 1, 4]])
    assert found[3] == ([0], [5], [[0, 1, 4]])


def test_the_mirror_grows_with_the_scheduler_and_keeps_what_it_has() -> None:
    scheduler = make_scheduler(2000, block_size=1, budget=400, seats=100)
    tables = DeviceBlockTables(1, "cpu")
    shapes = []
    for num_more, length in ((1, 50), (1, 100), (70, 2)):
        for i in range(num_more):
            scheduler.add(Request(f"{length}-{i}", [1 + i] * length, 40), 0.0)
        for _ in range(3):
            plan = scheduler.schedule(0.0)
            tables.update(plan, scheduler.block_tables)
            assert_equal(tables, plan, scheduler)
            scheduler.update(plan, [7] * len(plan.sampling_rows), 0.0)
        shapes.append(tuple(tables.tables.shape))

    assert shapes == [(64, 64), (64, 128), (128, 128)]
