"""What a memory notices of its own corruption while it works, at each level; every guard is tripped once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagedkv import CacheConfig, ConfigError, InvariantViolation, KVCacheManager, SimulatedPrompt
from pagedkv.recount import check_some
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig


def make_manager(check: str) -> KVCacheManager:
    """Row 0: 5 tokens, 2 named blocks and a tail; row 1: a swapped one; 2 evictable blocks, 3 free ones."""
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=2, num_host_blocks=4), check=check)
    for sequence_id, prompt in (("a", [1, 2, 3, 4, 5]), ("b", [5, 6, 7])):
        manager.open(sequence_id, prompt)
        manager.append(sequence_id, len(prompt))
    manager.swap_out("b")
    manager.open("c", [11, 12, 13, 14])
    manager.append("c", 4)
    manager.close("c")
    return manager


def table(manager: KVCacheManager) -> object:
    return manager.memory.sequences


CORRUPTIONS: dict[str, tuple[str, Callable[[KVCacheManager], object]]] = {
    "free blocks are counted below zero": ("I2", lambda m: setattr(m.memory.pool, "_num_free", -1)),
    "more blocks are free than there are": ("I2", lambda m: setattr(m.memory.pool, "_num_free", 99)),
    "a held block is free": ("I2", lambda m: m.memory.pool._free.__setitem__(m.memory.pool.num_free - 1, 0)),
    "a block was released twice": ("I1", lambda m: m.memory.pool.release(m.block_table("a")[2:])),
    "a row lost a block": ("I1", lambda m: table(m).num_blocks.__setitem__(0, 2)),
    "a row has slots for unknown tokens": ("I15", lambda m: table(m).num_known.__setitem__(0, 4)),
    "a block that is not full counts as named": ("I3", lambda m: table(m).num_named.__setitem__(0, 3)),
    "a key names another block": ("I3", lambda m: m.memory.cache._key_of.__setitem__(0, m.memory.cache.key_of(1))),
    "a shared tail is not marked": ("I5", lambda m: m.memory.pool.acquire(m.block_table("a")[2:])),
    "a swapped row holds device blocks": ("I6", lambda m: table(m).num_blocks.__setitem__(1, 1)),
}


def look_around(manager: KVCacheManager) -> None:
    for turn in range(128):
        check_some(manager.memory, turn)


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_the_cheap_level_finds_it_within_a_round(invariant: str, corrupt: Callable[[KVCacheManager], object]) -> None:
    manager = make_manager("off")
    look_around(manager)
    corrupt(manager)

    with pytest.raises(InvariantViolation) as caught:
        look_around(manager)

    assert caught.value.invariant == invariant


def test_the_cheap_level_looks_after_every_64th_operation_and_tells_which_it_was() -> None:
    manager = make_manager("cheap")
    manager.memory.pool._num_free = -1

    # The calls of make_manager count, too: three opens, three appends, a swap and a close: eight. What moves no block does not.
    for _ in range(55):
        manager.extend("a", [1])
        manager.append("a", num_tokens=0)

    with pytest.raises(InvariantViolation, match=r"I2: .* found after try_append"):
        manager.append("a", 0)


def test_the_full_level_looks_after_each_operation() -> None:
    manager = make_manager("full")
    manager.memory.pool.acquire(manager.block_table("a")[:1])

    with pytest.raises(InvariantViolation, match=r"I1: .* found after extend"):
        manager.extend("a", [1])


def test_the_full_level_looks_after_what_raises_too() -> None:
    manager = make_manager("full")
    manager.memory.pool.acquire(manager.block_table("a")[:1])

    with pytest.raises(InvariantViolation, match=r"I1: .* found after close"):
        manager.close("nobody")


@pytest.mark.parametrize("verb", ["schedule", "update", "abort", "add", "fail"])
def test_a_scheduler_on_a_checked_memory_is_checked(verb: str) -> None:
    scheduler = Scheduler(SchedulerConfig(8, 2), KVCacheManager(CacheConfig(8, 2), check="full"))
    scheduler.add(Request("a", SimulatedPrompt(4), 4), 0.0)
    plan = scheduler.schedule(0.0)
    if verb == "schedule":
        scheduler.update(plan, None, 0.0)
    scheduler._running.num_seats = 7
    calls = {
        "schedule": lambda: scheduler.schedule(0.0),
        "update": lambda: scheduler.update(plan, None, 0.0),
        "abort": lambda: scheduler.abort("a", 0.0),
        "add": lambda: scheduler.add(Request("b", SimulatedPrompt(4), 4), 0.0),
        "fail": lambda: scheduler.fail(plan, 0.0),
    }

    with pytest.raises(InvariantViolation, match=f"I15: .* found after {verb}"):
        calls[verb]()


def test_a_cheaply_checked_scheduler_finds_that_its_blocks_were_given_away() -> None:
    manager = KVCacheManager(CacheConfig(64, 4), check="cheap")
    scheduler = Scheduler(SchedulerConfig(8, 2), manager)
    scheduler.add(Request("a", SimulatedPrompt(5), 240), 0.0)
    for _ in range(4):
        scheduler.update(scheduler.schedule(0.0), None, 0.0)
    manager.memory.naming.catch_up()
    manager.memory.pool.release(manager.memory.sequences.blocks(0))

    with pytest.raises(InvariantViolation, match=r"I[1-5]: .* found after (schedule|update)"):
        run_to_the_end(scheduler)


def run_to_the_end(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        scheduler.update(scheduler.schedule(0.0), None, 0.0)


def test_without_checks_the_methods_are_the_class_own() -> None:
    manager = make_manager("off")
    scheduler = Scheduler(SchedulerConfig(8, 2), manager)

    assert manager.checks is None
    assert not {"open", "try_append", "close"} & set(vars(manager))
    assert not {"schedule", "update"} & set(vars(scheduler))


@pytest.mark.parametrize("check", ["", "fast", None, True, 1])
def test_a_level_is_one_of_three(check: object) -> None:
    with pytest.raises(ConfigError, match="off, cheap, full"):
        KVCacheManager(CacheConfig(4), check=check)


@pytest.mark.parametrize("error", [ZeroDivisionError("the cause"), KeyboardInterrupt()])
def test_a_violation_after_a_verb_that_raised_keeps_what_it_raised_as_its_cause(error, monkeypatch) -> None:
    manager = make_manager("full")

    def broken(*_: object) -> None:
        manager.memory.pool._num_free = -1
        raise error

    monkeypatch.setattr(type(manager.memory), "truncate", broken)
    with pytest.raises(InvariantViolation, match="found after truncate") as caught:
        manager.truncate("a", 3)

    assert caught.value.__cause__ is error
