"""Every allocation point fails at its n-th visit, for every n: nothing has changed, and a retry works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS, AllocationFaults, InjectedFailureError
from pagedkv.testing.state_digest import state_digest

Operation = Callable[[KVCacheManager], Any]


def begin(manager: KVCacheManager, sequence_id: str, prompt: list[int], num_tokens: int | None = None) -> None:
    hit = manager.open(sequence_id, prompt)
    manager.append(sequence_id, (len(prompt) if num_tokens is None else num_tokens) - hit)


def make_manager() -> KVCacheManager:
    """Sequence a: 5 tokens on the device; b: 3 tokens on the host; c and d: a fork with a shared tail; 2 evictable blocks."""
    manager = KVCacheManager(CacheConfig(num_blocks=12, block_size=2, num_host_blocks=6))
    begin(manager, "a", [1, 2, 3, 4, 5])
    begin(manager, "b", [6, 7, 8])
    manager.swap_out("b")
    begin(manager, "c", [9, 9, 9])
    manager.fork("c", "d")
    begin(manager, "gone", [11, 12, 13, 14])
    manager.close("gone")
    return manager


def append_all(manager: KVCacheManager) -> None:
    manager.extend("a", [1, 2, 3])
    manager.append("a", 3)


SCENARIOS: dict[str, Operation] = {
    "open, no hit": lambda m: m.open("new", [20, 21, 22]),
    "open, hit held": lambda m: m.open("new", [1, 2, 3, 4, 5, 6]),
    "open, hit evictable": lambda m: m.open("new", [11, 12, 13, 14, 15]),
    "open, simulated": lambda m: m.open("new", SimulatedPrompt(9)),
    "open, long": lambda m: m.open("new", list(range(200))),
    "look up, then open": lambda m: m.open("new", m.lookup([11, 12, 13, 14, 15])),
    "append nothing new": lambda m: m.append("a", 0),
    "extend and append": append_all,
    "append into a shared tail": lambda m: (m.extend("c", [10]), m.append("c", 1)),
    "append on both sides of a fork": lambda m: (
        m.extend("c", [10, 11, 12]), m.append("c", 3), m.extend("d", [13]), m.append("d", 1)
    ),
    "append, evicting": lambda m: (m.extend("a", [1] * 7), m.append("a", 7)),
    "append too much": lambda m: (m.extend("a", [1] * 50), m.try_append("a", 50)),
    "fork": lambda m: m.fork("a", "new"),
    "fork a fork": lambda m: (m.fork("d", "new"), m.extend("new", [1]), m.append("new", 1)),
    "truncate and append": lambda m: (m.truncate("a", 3), m.extend("a", [8, 9, 10]), m.append("a", 3)),
    "swap out": lambda m: m.swap_out("a"),
    "swap in": lambda m: m.swap_in("b"),
    "swap out and in": lambda m: (m.swap_out("a"), m.swap_in("a"), m.swap_out("a")),
    "swap in with hits": lambda m: (m.swap_out("a"), begin(m, "twin", [1, 2, 3, 4, 9]), m.swap_in("a")),
    "swap a fork out and in": lambda m: (m.swap_out("d"), m.swap_in("d"), m.extend("d", [3]), m.append("d", 1)),
    "close and open again": lambda m: (m.close("a"), begin(m, "a", [1, 2, 3, 4, 5])),
}  # fmt: skip


class Failures:
    """Runs a scenario verb by verb; where one fails, compares digests, and tries the same verb again."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.num_failures = 0

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.manager, name)

        def attempt(*args: Any) -> Any:
            before = state_digest(self.manager)
            try:
                return verb(*args)
            except InjectedFailureError:
                self.num_failures += 1
                self.manager.check_invariants()
                assert state_digest(self.manager) == before
                return verb(*args)

        return attempt


def reached_points(operation: Operation) -> dict[str, int]:
    manager = make_manager()
    faults = AllocationFaults(manager.memory)
    operation(manager)
    return faults.num_reached


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("point", ALLOCATION_POINTS)
def test_a_failed_allocation_changes_nothing_and_a_retry_succeeds(name: str, point: str) -> None:
    undisturbed = make_manager()
    SCENARIOS[name](undisturbed)
    for nth in range(1, 50):
        manager = make_manager()
        faults = AllocationFaults(manager.memory)
        faults.arm(point, nth)
        attempts = Failures(manager)

        SCENARIOS[name](attempts)

        manager.check_invariants()
        if faults.is_armed:
            assert nth == reached_points(SCENARIOS[name])[point] + 1
            break
        if point != "names":  # A failure to name costs the name, and is not raised.
            assert attempts.num_failures == 1
            assert state_digest(manager) == state_digest(undisturbed)
    for sequence_id in list(manager._row_of):
        manager.close(sequence_id)
    assert manager.statistics().num_used == manager.statistics().num_host_used == 0


def test_every_allocation_point_is_reached_by_some_scenario() -> None:
    reached = {point for operation in SCENARIOS.values() for point, n in reached_points(operation).items() if n}

    assert reached == set(ALLOCATION_POINTS)
