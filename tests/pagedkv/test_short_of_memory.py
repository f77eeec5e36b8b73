"""What is left when Python itself runs out of memory halfway: names are lost, nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from memory_machine import digest

from pagedkv import BlockPool, CacheConfig, KVCacheManager, PrefixCache, SimulatedPrompt
from pagedkv.sequences import SequenceTable


class FullMap(dict):
    """Takes `room` keys more, then there is no memory."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def setdefault(self, key: object, value: int) -> int:
        if key not in self:
            self._take_room()
        return super().setdefault(key, value)

    def update(self, pairs: object) -> None:
        for key, value in pairs:
            self._take_room()
            self[key] = value

    def _take_room(self) -> None:
        if self.room == 0:
            raise MemoryError
        self.room -= 1


def fill(cache: PrefixCache, room: int) -> None:
    """Leave the map room for so many keys beside those it has."""
    full = FullMap(room)
    for key, block_id in cache._block_of.items():
        dict.__setitem__(full, key, block_id)
    cache._block_of = full


NONE = np.array([-1, -1, -1])
NAMINGS: dict[str, Callable[[PrefixCache, np.ndarray], object]] = {
    "blocks of one sequence": lambda cache, ids: cache.name_chain([b"a", b"b", b"c"], ids, -1),
    "fresh blocks of several": lambda cache, ids: cache.name_fresh([b"a", b"b", b"c"], ids, NONE),
    "blocks of several": lambda cache, ids: cache.name_each([b"a", b"b", b"c"], ids, NONE),
}


@pytest.mark.parametrize("name", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("room", [0, 2])
def test_a_map_without_room_for_all_names_takes_none(name: Callable[..., object], room: int) -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    fill(cache, room)
    with pytest.raises(MemoryError):
        name(cache, pool.allocate(3))

    assert len(cache) == 0
    assert pool.is_named(np.arange(4)).tolist() == [False] * 4
    cache.check_invariants()


def test_a_key_that_names_another_block_keeps_it_when_a_later_one_finds_no_room() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    cache.name_chain([b"a"], pool.allocate(1), -1)
    fill(cache, 1)
    with pytest.raises(MemoryError):
        cache.name_each([b"a", b"b", b"c"], pool.allocate(3), NONE)

    assert cache.blocks([b"a"], 1).tolist() == [0]
    assert len(cache) == 1
    cache.check_invariants()


def short_of_names(prompt: object) -> KVCacheManager:
    """Sequence `a` with three computed tokens in blocks of two; the map has no room for another name."""
    manager = KVCacheManager(CacheConfig(num_blocks=6, block_size=2))
    manager.open("a", prompt)
    manager.append("a", 3)
    fill(manager.memory.cache, 0)
    return manager


APPENDS: dict[str, tuple[object, Callable[[KVCacheManager, np.ndarray], object]]] = {
    "a run": ([1, 2, 3, 4, 5, 6], lambda m, row: m.memory.try_append_run(int(row[0]), 3)),
    "a single token": ([1, 2, 3, 4, 5, 6], lambda m, row: m.memory.try_append_single(row, m.memory.sequences.num_computed[row])),
    "simulated steps": (SimulatedPrompt(3), lambda m, row: m.memory.leaps.append(row, 2)),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "append"), APPENDS.values(), ids=APPENDS)
def test_blocks_that_cannot_be_named_are_filled_without_a_name(
    prompt: object, append: Callable[[KVCacheManager, np.ndarray], object]
) -> None:
    manager = short_of_names(prompt)
    assert append(manager, np.array([manager.row("a")])) is not None

    assert len(manager.memory.cache) == 1
    assert manager.memory.sequences.num_named[manager.row("a")] == 1
    assert manager.num_computed("a") >= 4
    manager.check_invariants()


def test_a_hit_is_pinned_still_if_no_row_can_be_made_for_it(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    hit = manager.lookup([1, 2, 9])
    before = digest(manager)
    with monkeypatch.context() as patch:
        patch.setattr(SequenceTable, "add", out_of_memory)
        with pytest.raises(MemoryError):
            manager.open("b", hit)
        assert digest(manager) == before
        with pytest.raises(MemoryError):
            manager.open("b", [1, 2, 9])
        assert digest(manager) == before

    assert manager.open("b", hit) == 2
    manager.check_invariants()


def test_a_swap_in_that_gets_no_blocks_lets_go_of_its_hits(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    before = digest(manager)
    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "try_allocate", out_of_memory)
        with pytest.raises(MemoryError):
            manager.swap_in("a")

    assert digest(manager) == before
    assert len(manager.swap_in("a")) == 1  # The named block was still there.
    manager.check_invariants()


def out_of_memory(*_: object) -> None:
    raise MemoryError
