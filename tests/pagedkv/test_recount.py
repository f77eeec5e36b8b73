"""Every guard of the recount is tripped once: a check that cannot fail looks like health."""

from collections.abc import Callable

import numpy as np
import pytest

from pagedkv import CacheConfig, InvariantViolation, KVCacheManager


@pytest.fixture
def manager() -> KVCacheManager:
    """Row 0 on the device: 4 tokens, 2 named blocks; row 1 on the device: 1 token; row 2 on the host."""
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=2, num_host_blocks=4))
    for sequence_id, prompt in (("a", [1, 2, 3, 4]), ("b", [5]), ("c", [6])):
        manager.open(sequence_id, prompt)
        manager.append(sequence_id, len(prompt))
    manager.swap_out("c")
    return manager


def test_a_healthy_memory_passes(manager: KVCacheManager) -> None:
    with manager.lookup([1, 2, 3]):
        manager.check_invariants()


def table(manager: KVCacheManager) -> object:
    return manager.memory.sequences


CORRUPTIONS: dict[str, tuple[str, Callable[[KVCacheManager], object]]] = {
    "a block has a holder too many": ("I1", lambda m: m.memory.pool.acquire(np.array([2]))),
    "a block is in two tables but held once": ("I1", lambda m: table(m).block_tables.__setitem__((1, 0), 0)),
    "a pin was lost": ("I1", lambda m: (m.lookup([1, 2, 3]), m._pinned.clear())),
    "a host block has no owner": ("I1", lambda m: m.memory.host_pool.allocate(1)),
    "a row holds too few blocks for its tokens": (
        "I1",
        lambda m: (table(m).num_computed.__setitem__(1, 3), table(m).num_known.__setitem__(1, 3)),
    ),
    "a swapped row holds too many host blocks": ("I6", lambda m: table(m).num_computed.__setitem__(2, 0)),
    "a swapped row holds device blocks": (
        "I6",
        lambda m: m.memory.sequences.append_blocks(np.array([2]), np.array([1]), m.memory.pool.allocate(1)),
    ),
    "a live row is not counted": ("I10", lambda m: setattr(table(m), "num_live", 2)),
    "a row that was given back is still live": ("I10", lambda m: table(m).is_live.__setitem__(5, True)),
    "a shared tail is not counted": ("I5", lambda m: table(m).has_shared_tail.__setitem__(1, True)),
    "a shared tail is counted and not marked": ("I5", lambda m: setattr(m.memory.shared_tails, "num_marked", 1)),
    "a row has slots for unknown tokens": ("I15", lambda m: table(m).num_known.__setitem__(0, 3)),
    "a row counts a block as named that is not full": ("I3", lambda m: table(m).num_named.__setitem__(1, 1)),
    "a row counts blocks as named that lost their names": ("I3", lambda m: m.memory.cache.clear()),
    "a row's key names another block": (
        "I3",
        lambda m: (
            table(m).block_tables.__setitem__((0, 0), 1),
            table(m).block_tables.__setitem__((0, 1), 0),
        ),
    ),
}


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_the_recount_finds(
    manager: KVCacheManager, invariant: str, corrupt: Callable[[KVCacheManager], object]
) -> None:
    corrupt(manager)
    with pytest.raises(InvariantViolation) as caught:
        manager.check_invariants()
    assert caught.value.invariant == invariant


def test_a_row_that_was_given_back_has_no_content(manager: KVCacheManager) -> None:
    row = manager.row("b")
    manager.close("b")
    with pytest.raises(InvariantViolation, match="I9: row 1 is used after it was given back"):
        manager.memory.sequences.content(row)
