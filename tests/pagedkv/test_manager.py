"""Every verb's mistakes are refused, and sequences grow as far as there are blocks."""

from collections.abc import Callable

import numpy as np
import pytest
from memory_machine import digest

from pagedkv import (
    CacheConfig,
    ConfigError,
    DuplicateIdError,
    InvalidArgumentError,
    KVCacheManager,
    OutOfBlocksError,
    SimulatedPrompt,
    UnknownIdError,
)
from pagedkv.testing.manager_allocator import pairs


@pytest.fixture
def busy() -> KVCacheManager:
    """`a` on the device with five known and four computed tokens, `s` on the host, one evictable block, one free."""
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2, num_host_blocks=1))
    manager.open("gone", [7, 8])
    manager.append("gone", 2)
    manager.open("s", [9])
    manager.append("s", 1)
    manager.swap_out("s")
    manager.close("gone")
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 4)
    return manager


MISTAKES: dict[str, tuple[type[Exception], Callable[[KVCacheManager], object]]] = {
    "open: duplicate id": (DuplicateIdError, lambda m: m.open("a", [1])),
    "open: duplicate id of a swapped sequence": (DuplicateIdError, lambda m: m.open("s", [1])),
    "open: an id that cannot be hashed": (InvalidArgumentError, lambda m: m.open(["b"], [1])),
    "fork: an id that cannot be hashed": (InvalidArgumentError, lambda m: m.fork("a", ["b"])),
    "open: empty prompt": (InvalidArgumentError, lambda m: m.open("b", [])),
    "open: floats": (InvalidArgumentError, lambda m: m.open("b", [1.0])),
    "open: NaN": (InvalidArgumentError, lambda m: m.open("b", [float("nan")])),
    "open: a number": (InvalidArgumentError, lambda m: m.open("b", 5)),
    "open: a negative token": (InvalidArgumentError, lambda m: m.open("b", [1, -1])),
    "open: too large a token": (InvalidArgumentError, lambda m: m.open("b", [2**31])),
    "open: salt of 65 bytes": (InvalidArgumentError, lambda m: m.open("b", [1], salt=bytes(65))),
    "open: adapter of bytes": (InvalidArgumentError, lambda m: m.open("b", [1], adapter=b"x")),
    "open: an item that is none": (InvalidArgumentError, lambda m: m.open("b", [1], extras=["x"])),
    "open: an item as a tuple": (InvalidArgumentError, lambda m: m.open("b", [1], extras=[(0, 1, b"x")])),
    "open: items that cannot be counted": (InvalidArgumentError, lambda m: m.open("b", [1], extras=5)),
    "open: simulated with a salt": (InvalidArgumentError, lambda m: m.open("b", SimulatedPrompt(2), salt=b"x")),
    "open: simulated with an adapter": (InvalidArgumentError, lambda m: m.open("b", SimulatedPrompt(2), adapter="")),
    "open: simulated ids of another size": (
        InvalidArgumentError,
        lambda m: m.open("b", SimulatedPrompt(6, [1, 2], 3)),
    ),
    "lookup: empty prompt": (InvalidArgumentError, lambda m: m.lookup([])),
    "lookup: salt of 65 bytes": (InvalidArgumentError, lambda m: m.lookup([1], salt=bytes(65))),
    "append: unknown id": (UnknownIdError, lambda m: m.append("b", 1)),
    "append: more than is known": (InvalidArgumentError, lambda m: m.append("a", 2)),
    "append: negative": (InvalidArgumentError, lambda m: m.append("a", -1)),
    "append: huge": (InvalidArgumentError, lambda m: m.append("a", 2**70)),
    "append: NaN": (InvalidArgumentError, lambda m: m.append("a", float("nan"))),
    "append: a float": (InvalidArgumentError, lambda m: m.append("a", 1.0)),
    "append: a boolean": (InvalidArgumentError, lambda m: m.append("a", True)),
    "append: swapped out": (InvalidArgumentError, lambda m: m.append("s", 0)),
    "try_append: more than is known": (InvalidArgumentError, lambda m: m.try_append("a", 2)),
    "extend: unknown id": (UnknownIdError, lambda m: m.extend("b", [1])),
    "extend: a number of real tokens": (InvalidArgumentError, lambda m: m.extend("a", 1)),
    "extend: a numpy number": (InvalidArgumentError, lambda m: m.extend("a", np.int64(1))),
    "extend: the last token is wrong": (InvalidArgumentError, lambda m: m.extend("a", [1, 2, -3])),
    "extend: NaN": (InvalidArgumentError, lambda m: m.extend("a", [float("nan")])),
    "fork: unknown source": (UnknownIdError, lambda m: m.fork("b", "c")),
    "fork: duplicate id": (DuplicateIdError, lambda m: m.fork("a", "s")),
    "fork: onto itself": (DuplicateIdError, lambda m: m.fork("a", "a")),
    "fork: swapped out": (InvalidArgumentError, lambda m: m.fork("s", "c")),
    "truncate: unknown id": (UnknownIdError, lambda m: m.truncate("b", 1)),
    "truncate: to nothing": (InvalidArgumentError, lambda m: m.truncate("a", 0)),
    "truncate: beyond the end": (InvalidArgumentError, lambda m: m.truncate("a", 6)),
    "truncate: NaN": (InvalidArgumentError, lambda m: m.truncate("a", float("nan"))),
    "truncate: swapped out": (InvalidArgumentError, lambda m: m.truncate("s", 1)),
    "swap_out: unknown id": (UnknownIdError, lambda m: m.swap_out("b")),
    "swap_out: twice": (InvalidArgumentError, lambda m: m.swap_out("s")),
    "swap_out: host pool full": (OutOfBlocksError, lambda m: m.swap_out("a")),
    "swap_in: unknown id": (UnknownIdError, lambda m: m.swap_in("b")),
    "swap_in: not swapped out": (InvalidArgumentError, lambda m: m.swap_in("a")),
    "close: unknown id": (UnknownIdError, lambda m: m.close("b")),
    "close: id of a closed sequence": (UnknownIdError, lambda m: m.close("gone")),
    "close: NaN": (UnknownIdError, lambda m: m.close(float("nan"))),
    "row: unknown id": (UnknownIdError, lambda m: m.row("b")),
    "block_table: unknown id": (UnknownIdError, lambda m: m.block_table("b")),
    "num_computed: unknown id": (UnknownIdError, lambda m: m.num_computed("b")),
}


@pytest.mark.parametrize(("kind", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_raises_its_own_error_and_changes_nothing(
    busy: KVCacheManager, kind: type[Exception], mistake: Callable[[KVCacheManager], object]
) -> None:
    before = digest(busy)
    with pytest.raises(kind) as caught:
        mistake(busy)
    assert type(caught.value) is kind
    assert digest(busy) == before
    busy.check_invariants()


def test_the_error_names_the_id() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1))
    with pytest.raises(UnknownIdError, match="no open sequence 'nobody'"):
        manager.close("nobody")
    manager.open("a", [1])
    with pytest.raises(DuplicateIdError, match="sequence 'a' is open already"):
        manager.open("a", [1])


def test_any_hashable_is_an_id_and_may_be_used_again_after_close(manager: KVCacheManager) -> None:
    for sequence_id in ("", "ü" * 1000, None, 0, (1, "x"), frozenset((1,)), b"x"):
        manager.open(sequence_id, [1])
        assert sequence_id in manager
        manager.close(sequence_id)
        assert sequence_id not in manager
        manager.open(sequence_id, [1])
    assert len(manager) == 7


# Growing


def test_slots_follow_the_block_table(manager: KVCacheManager) -> None:
    manager.open("x", [1])
    manager.append("x", 1)
    manager.open("a", [1, 2, 3, 4, 5])
    assert manager.append("a", 3).slots.tolist() == [2, 3, 4]
    assert manager.append("a", 2).slots.tolist() == [5, 6]
    assert manager.block_table("a").tolist() == [1, 2, 3]


def test_the_last_block_can_be_had() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2))
    manager.open("a", [1, 2, 3, 4, 5])
    assert manager.append("a", 4).slots.tolist() == [0, 1, 2, 3]


def test_one_token_more_than_fits_is_a_shortage_and_changes_nothing() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2))
    manager.open("a", [1, 2, 3, 4, 5])
    before = digest(manager)
    assert manager.try_append("a", 5) is None
    with pytest.raises(OutOfBlocksError, match="3 blocks requested, 2 can be had"):
        manager.append("a", 5)
    assert digest(manager) == before


def test_a_shortage_counts_the_copy_on_write_and_the_new_blocks() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2))
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 1)
    manager.fork("a", "b")
    with pytest.raises(OutOfBlocksError, match="3 blocks requested, 1 can be had"):
        manager.append("a", 4)  # The shared block anew, and two more.


def test_a_copy_on_write_that_finds_no_block_is_a_shortage_of_one() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=2))
    manager.open("a", [1, 2])
    manager.append("a", 1)
    manager.fork("a", "b")
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="1 blocks requested, 0 can be had"):
        manager.append("a", 1)
    assert digest(manager) == before


def test_appending_nothing_takes_and_copies_nothing_however_full_the_pool() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=2))
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    before = digest(manager)
    appended = manager.append("a", 0)
    assert (appended.slots.tolist(), pairs(appended.copies)) == ([], [])
    assert digest(manager) == before


def test_opening_takes_no_block(manager: KVCacheManager) -> None:
    assert manager.open("a", list(range(1000))) == 0
    assert manager.statistics().num_used == 0


def test_a_sequence_longer_than_the_first_table_grows_it() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=200, block_size=1))
    manager.open("a", list(range(200)))
    assert manager.append("a", 200).slots.tolist() == list(range(200))
    manager.check_invariants()


def test_more_sequences_than_first_rows_grow_the_table() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=200, block_size=1))
    for sequence_id in range(150):
        manager.open(sequence_id, [sequence_id])
        manager.append(sequence_id, 1)
    assert [manager.block_table(i).tolist() for i in (0, 64, 149)] == [[0], [64], [149]]
    manager.check_invariants()


def test_a_simulated_sequence_is_extended_by_a_number(manager: KVCacheManager) -> None:
    manager.open("a", SimulatedPrompt(3))
    manager.extend("a", 2)
    assert manager.append("a", 5).slots.tolist() == [0, 1, 2, 3, 4]
    for wrong in (-1, True, 1.0, [1], 2**70):
        with pytest.raises(InvalidArgumentError, match="token_ids"):
            manager.extend("a", wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": 5}, "config must be a CacheConfig, found one of type int"),
        ({"config": CacheConfig(4), "eviction": "lru"}, r"eviction must be an object such as LRU\(4\), found 'lru'"),
    ],
)
def test_what_is_no_configuration_and_no_policy_is_refused(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVCacheManager(**arguments)
