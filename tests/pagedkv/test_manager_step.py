"""`with manager.step()`: a step that fails leaves nothing that was not written; one under way is hit by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pagedkv import BlockStateError, CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig


class ModelError(Exception):
    """The model failed."""


@pytest.fixture
def manager() -> KVCacheManager:
    return KVCacheManager(CacheConfig(num_blocks=8, block_size=2, num_host_blocks=4), check="full")


@contextmanager
def failed_step(manager: KVCacheManager, error: type[BaseException] = ModelError) -> Iterator[None]:
    """A step that raises when all of its body was done."""
    with pytest.raises(error), manager.step():  # noqa: PT012 - the body is that of each test
        yield
        raise error


def hit(manager: KVCacheManager, prompt: list[int]) -> int:
    with manager.lookup(prompt) as found:
        return found.num_tokens


def test_what_a_failed_step_filled_is_never_hit(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 2)
    with failed_step(manager):
        manager.append("a", 3)
    assert (manager.num_computed("a"), hit(manager, [1, 2, 3, 4, 5])) == (2, 2)
    manager.close("a")
    assert hit(manager, [1, 2, 3, 4, 5]) == 2


def test_the_tokens_of_a_failed_step_can_be_appended_again(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    with failed_step(manager):
        manager.append("a", 5)
    with manager.step():
        assert len(manager.append("a", 5).slots) == 5
    assert hit(manager, [1, 2, 3, 4, 5]) == 4


def test_what_a_step_fills_is_hit_once_it_has_ended(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    with manager.step():
        manager.append("a", 4)
        assert (hit(manager, [1, 2, 3, 4, 5]), manager.open("b", [1, 2, 3])) == (0, 0)
    assert (hit(manager, [1, 2, 3, 4, 5]), manager.open("c", [1, 2, 3])) == (4, 2)


def test_a_fork_of_unwritten_slots_is_taken_back_too(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 1)
    with failed_step(manager):
        manager.append("a", 2)
        manager.fork("a", "b")
        manager.extend("b", [7])
        manager.append("b", 1)
    assert (manager.num_computed("a"), manager.num_computed("b")) == (1, 1)
    assert manager.statistics().num_used == 1


def test_a_copy_on_write_that_was_not_carried_out_takes_the_tokens_before_it_along(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.fork("a", "b")
    manager.extend("b", [7])
    with failed_step(manager):
        assert len(manager.append("b", 1).copies) == 1
    assert (manager.num_computed("a"), manager.num_computed("b")) == (3, 2)


def test_sequences_that_are_cut_or_closed_within_a_failed_step_stay_so(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.open("b", [5, 6])
    manager.append("a", 4)
    with failed_step(manager):
        manager.extend("a", [8])
        manager.append("a", 1)
        manager.truncate("a", 3)
        manager.append("b", 2)
        manager.close("b")
        manager.open("c", [9])  # In the row that b had.
    assert (manager.num_computed("a"), manager.num_computed("c"), "b" in manager) == (3, 0, False)


def test_a_failed_step_leaves_what_was_written_before_it_to_whoever_forked_or_cut_it(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 4)
    with failed_step(manager):
        manager.fork("a", "b")
        manager.truncate("a", 3)
    assert (manager.num_computed("a"), manager.num_computed("b")) == (3, 4)


def test_an_append_that_runs_short_within_a_step_leaves_nothing_to_take_back(manager: KVCacheManager) -> None:
    manager.open("a", [1] * 18)
    manager.append("a", 2)
    with failed_step(manager):
        assert manager.try_append("a", 16) is None
    assert (manager.num_computed("a"), manager.statistics().num_used) == (2, 1)


def test_an_interrupt_takes_a_step_back(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    with failed_step(manager, KeyboardInterrupt):
        manager.append("a", 2)
    assert manager.num_computed("a") == 0


def test_slots_that_are_not_written_are_not_swapped_out(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    with manager.step():
        manager.append("a", 2)
        with pytest.raises(BlockStateError, match="'a' has slots that this step is yet to write: swap it later"):
            manager.swap_out("a")
    assert len(manager.swap_out("a")) == 1


def test_one_step_at_a_time(manager: KVCacheManager) -> None:
    scheduler = Scheduler(SchedulerConfig(8, 4), manager)
    scheduler.add(Request("r", [1, 2], 1), 0.0)
    with manager.step():
        for begin in (manager.step().__enter__, lambda: scheduler.schedule(0.0)):
            with pytest.raises(BlockStateError, match="another step is under way on this memory: it must end first"):
                begin()
    plan = scheduler.schedule(0.0)
    with pytest.raises(BlockStateError, match="another step is under way"):
        manager.step().__enter__()
    scheduler.update(plan, [1], 0.0)
    with manager.step():
        pass


def test_what_a_schedulers_step_fills_is_not_hit_before_its_update(manager: KVCacheManager) -> None:
    scheduler = Scheduler(SchedulerConfig(8, 4), manager)
    scheduler.add(Request("r", [1, 2, 3, 4], 2), 0.0)
    plan = scheduler.schedule(0.0)
    assert manager.open("early", [1, 2, 3, 4, 5]) == 0
    scheduler.fail(plan, 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1], 0.0)
    assert manager.open("late", [1, 2, 3, 4, 5]) == 4


def test_a_block_that_a_failed_step_named_twice_loses_its_name_once() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2), check="full")
    manager.open("a", [1, 2, 3, 4])
    with failed_step(manager):
        manager.append("a", 4)
        manager.truncate("a", 2)
        manager.extend("a", [8, 9])
        manager.append("a", 2)  # Evicts the block that was let go of, and names it anew.
    assert (manager.num_computed("a"), hit(manager, [1, 2, 7])) == (0, 0)


def swapped_out(manager: KVCacheManager) -> None:
    """Sequence "x" is on the host, and the device remembers nothing of it."""
    manager.open("x", [1, 2, 3, 4, 5])
    manager.append("x", 5)
    manager.swap_out("x")
    assert manager.reset_prefix_cache()


def test_what_a_failed_step_swapped_in_is_pending_again_and_has_no_names(manager: KVCacheManager) -> None:
    swapped_out(manager)
    with failed_step(manager):
        assert len(manager.swap_in("x")) == 3
    assert (manager.num_computed("x"), hit(manager, [1, 2, 3, 4, 5])) == (0, 0)
    assert len(manager.append("x", 5).slots) == 5


def swap_in_beside_a_schedulers_step_that_fails(manager: KVCacheManager, prompt: list[int]) -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=64, max_num_running=4), manager)
    scheduler.add(Request("a", prompt, 4), now=0.0)
    plan = scheduler.schedule(0.0)
    assert len(manager.swap_in("x")) == 3
    scheduler.fail(plan, 0.0)
    scheduler.check_invariants()


def test_a_sequence_that_is_swapped_in_beside_a_schedulers_step_keeps_its_names_when_that_fails(
    manager: KVCacheManager,
) -> None:
    swapped_out(manager)
    swap_in_beside_a_schedulers_step_that_fails(manager, [9, 9, 9, 9])
    assert (manager.num_computed("x"), hit(manager, [1, 2, 3, 4, 5])) == (5, 4)


def test_a_swap_in_hits_nothing_that_a_schedulers_step_is_yet_to_write(manager: KVCacheManager) -> None:
    swapped_out(manager)
    swap_in_beside_a_schedulers_step_that_fails(manager, [1, 2, 3, 4])
    assert manager.num_computed("x") == 5
