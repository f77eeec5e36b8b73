from collections.abc import Callable

import numpy as np
import pytest
from memory_machine import digest

from pagedkv import (
    BlockStateError,
    CacheConfig,
    CacheIdentity,
    DuplicateIdError,
    ExtraKey,
    InvalidArgumentError,
    KVCacheManager,
    OutOfBlocksError,
    SimulatedPrompt,
    UnknownIdError,
)


def pairs(copies: object) -> list[tuple[int, int]]:
    return list(zip(copies.sources.tolist(), copies.targets.tolist(), strict=True))


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


# Hits


def test_two_models_in_one_process_have_different_keys() -> None:
    keys = []
    for model in ("one", "two"):
        manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=1, identity=CacheIdentity(model)))
        manager.open("a", [1])
        manager.append("a", 1)
        keys.append(manager.memory.cache.key_of(0))
    assert keys[0] != keys[1]


def test_a_hit_leaves_at_least_one_token_to_compute(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 4)
    assert manager.open("exactly", [1, 2, 3, 4]) == 2
    assert manager.open("one more", [1, 2, 3, 4, 5]) == 4
    assert manager.open("shorter", [1, 2]) == 0


def test_a_partly_filled_block_is_never_hit(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    assert manager.open("b", [1, 2, 3, 4]) == 2


def test_a_known_but_not_computed_block_is_never_hit(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4])
    manager.append("a", 2)
    assert manager.open("b", [1, 2, 3, 4, 5]) == 2


def test_a_pinned_hit_survives_the_eviction_of_everything_else() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=3, block_size=1))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.close("a")
    hit = manager.lookup([1, 2])
    manager.open("b", [7, 8])
    manager.append("b", 2)
    assert manager.open("c", hit) == 1
    assert manager.block_table("c").tolist() == [0]
    manager.check_invariants()


def test_a_dropped_hit_can_be_neither_dropped_nor_opened_again(manager: KVCacheManager) -> None:
    hit = manager.lookup([1, 2, 3])
    hit.drop()
    before = digest(manager)
    with pytest.raises(BlockStateError, match="used or dropped already"):
        hit.drop()
    with pytest.raises(BlockStateError, match="used or dropped already"):
        manager.open("a", hit)
    assert digest(manager) == before


def test_a_used_hit_can_be_neither_dropped_nor_opened_again(manager: KVCacheManager) -> None:
    hit = manager.lookup([1, 2, 3])
    manager.open("a", hit)
    before = digest(manager)
    with pytest.raises(BlockStateError):
        hit.drop()
    with pytest.raises(BlockStateError):
        manager.open("b", hit)
    assert digest(manager) == before


def test_a_hit_that_was_refused_for_a_duplicate_id_stays_usable(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    hit = manager.lookup([1, 2, 3])
    with pytest.raises(DuplicateIdError):
        manager.open("a", hit)
    assert manager.open("b", hit) == 2


def test_a_hit_of_another_manager_is_refused_and_stays_usable(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    other = KVCacheManager(CacheConfig(num_blocks=6, block_size=2))
    hit = manager.lookup([1, 2, 3])
    with pytest.raises(BlockStateError, match="another manager"):
        other.open("b", hit)
    assert len(other) == 0
    assert manager.open("b", hit) == 2
    manager.check_invariants()


@pytest.mark.parametrize("more", [{"salt": b"x"}, {"adapter": "x"}, {"extras": [ExtraKey(0, 1, b"x")]}])
def test_a_hit_takes_no_second_namespace(manager: KVCacheManager, more: dict[str, object]) -> None:
    with manager.lookup([1, 2, 3]) as hit, pytest.raises(InvalidArgumentError, match="prefix hit"):
        manager.open("b", hit, **more)
    assert len(manager) == 0


def test_a_hit_drops_itself_at_the_end_of_its_block_unless_it_was_used(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.close("a")
    with manager.lookup([1, 2, 3]) as hit:
        assert (hit.num_tokens, manager.statistics().num_used) == (2, 1)
    assert manager.statistics().num_used == 0
    with manager.lookup([1, 2, 3]) as hit:
        manager.open("b", hit)
    assert manager.statistics().num_used == 1
    with pytest.raises(ZeroDivisionError), manager.lookup([1, 2, 9]):
        raise ZeroDivisionError
    assert manager.statistics().num_used == 1
    manager.check_invariants()


def test_two_sequences_that_computed_the_same_keep_their_own_blocks(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.open("b", [1, 2])
    manager.append("a", 2)
    manager.append("b", 2)
    assert (manager.block_table("a").tolist(), manager.block_table("b").tolist()) == ([0], [1])
    with manager.lookup([1, 2, 3]) as hit:
        assert hit.block_ids.tolist() == [0]
    manager.close("b")
    assert manager.memory.pool.order() == [1, 2, 3, 4, 5]


def test_a_duplicate_names_nothing_further(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.open("b", [1, 2])
    manager.extend("b", [3, 4])
    manager.append("b", 4)
    with manager.lookup([1, 2, 3, 4, 5]) as hit:
        assert hit.block_ids.tolist() == [0]


def test_a_hit_on_an_item_needs_the_same_item_at_the_same_place(manager: KVCacheManager) -> None:
    prompt = [0, 0, 0, 0, 5]
    manager.open("a", prompt, extras=[ExtraKey(0, 3, b"cat")])
    manager.append("a", 5)
    assert manager.open("same", prompt, extras=[ExtraKey(0, 3, b"cat")]) == 4
    assert manager.open("other item", prompt, extras=[ExtraKey(0, 3, b"dog")]) == 0
    assert manager.open("other end", prompt, extras=[ExtraKey(0, 4, b"cat")]) == 0
    assert manager.open("no item", prompt) == 0


# Forks and copies on write


def test_the_first_of_two_forks_to_write_copies_and_the_second_writes_in_place(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.fork("a", "b")
    manager.extend("a", [4])
    manager.extend("b", [5])
    first, second = manager.append("a", 1), manager.append("b", 1)
    assert (pairs(first.copies), first.slots.tolist()) == ([(1, 2)], [5])
    assert (pairs(second.copies), second.slots.tolist()) == ([], [3])


def test_of_three_forks_two_copy(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.fork("b", "c")
    num_copies = []
    for sequence_id in ("c", "a", "b"):
        manager.extend(sequence_id, [2])
        num_copies.append(len(manager.append(sequence_id, 1).copies))
    assert num_copies == [1, 1, 0]


def test_a_fork_at_a_block_boundary_copies_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.fork("a", "b")
    for sequence_id in ("a", "b"):
        manager.extend(sequence_id, [3])
        assert len(manager.append(sequence_id, 1).copies) == 0
    assert manager.statistics().num_used == 3


def test_a_fork_whose_other_half_is_closed_copies_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.close("a")
    manager.extend("b", [2])
    assert len(manager.append("b", 1).copies) == 0


def test_copying_and_growing_in_one_call_takes_the_copy_first(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.append("a", 1)
    manager.fork("a", "b")
    manager.extend("b", [2, 3])
    appended = manager.append("b", 2)
    assert (pairs(appended.copies), appended.slots.tolist()) == ([(0, 1)], [3, 4])


def test_forks_extend_on_their_own(manager: KVCacheManager) -> None:
    manager.open("a", [1])
    manager.fork("a", "b")
    manager.extend("a", [2])
    manager.extend("b", [3])
    manager.append("a", 2)
    manager.append("b", 2)
    assert manager.open("like a", [1, 2, 9]) == 2
    assert manager.open("like b", [1, 3, 9]) == 2


def test_a_simulated_fork_shares_only_what_was_known(manager: KVCacheManager) -> None:
    manager.open("a", SimulatedPrompt(3, [7, 8], 2))
    manager.append("a", 3)
    manager.fork("a", "b")
    manager.extend("a", 1)
    manager.extend("b", 1)
    manager.append("a", 1)
    manager.append("b", 1)
    keys = [manager.memory.cache.key_of(int(manager.block_table(i)[1])) for i in ("a", "b")]
    assert None not in keys
    assert keys[0] != keys[1]


# Truncating


def test_truncating_gives_the_blocks_back_that_only_the_dropped_tokens_needed(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 5)
    manager.truncate("a", 2)
    assert (manager.block_table("a").tolist(), manager.num_computed("a")) == ([0], 2)
    assert manager.memory.pool.order() == [2, 3, 4, 5, 1]


def test_truncating_tokens_without_slots_keeps_every_block(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 2)
    manager.truncate("a", 3)
    assert (manager.block_table("a").tolist(), manager.num_computed("a")) == ([0], 2)
    with pytest.raises(InvalidArgumentError):
        manager.append("a", 2)


def test_truncating_to_all_known_tokens_changes_nothing(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    before = digest(manager)
    manager.truncate("a", 3)
    assert digest(manager) == before


def test_writing_into_a_named_block_after_truncating_copies_it(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.truncate("a", 1)
    manager.extend("a", [9])
    appended = manager.append("a", 1)
    assert (pairs(appended.copies), appended.slots.tolist()) == ([(0, 1)], [3])
    assert manager.open("b", [1, 2, 3]) == 2
    assert manager.open("c", [1, 9, 3]) == 2


def test_writing_into_an_unnamed_block_after_truncating_does_not_copy() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=2, prefix_caching=False))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.truncate("a", 1)
    manager.extend("a", [9])
    assert len(manager.append("a", 1).copies) == 0


def test_dropped_and_replaced_tokens_are_hit_under_their_new_name_only(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.truncate("a", 2)
    manager.extend("a", [9, 9])
    manager.append("a", 2)
    assert manager.open("old", [1, 2, 3, 9, 5]) == 2
    assert manager.open("new", [1, 2, 9, 9, 5]) == 4


# Swapping


def test_a_sequence_comes_back_from_the_host_into_new_blocks() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=3, block_size=2, num_host_blocks=3, prefix_caching=False))
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    out = manager.swap_out("a")
    assert out.sources.tolist() == [0, 1]
    assert sorted(out.targets.tolist()) == [0, 1]
    assert manager.block_table("a").tolist() == []
    manager.open("b", [9])
    manager.append("b", 1)
    back = manager.swap_in("a")
    assert back.sources.tolist() == out.targets.tolist()
    assert back.targets.tolist() == manager.block_table("a").tolist() == [1, 2]
    assert manager.statistics().num_host_used == 0


def test_blocks_that_are_still_cached_are_not_copied_back(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3, 4, 5])
    manager.append("a", 5)
    out = manager.swap_out("a")
    back = manager.swap_in("a")
    assert manager.block_table("a").tolist() == [0, 1, 2]
    assert pairs(back) == [(int(out.targets[2]), 2)]


def test_the_host_pool_can_be_filled_exactly() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=1, num_host_blocks=2))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    assert len(manager.swap_out("a")) == 2
    manager.open("b", [1])
    manager.append("b", 1)
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="1 blocks requested, 0 can be had"):
        manager.swap_out("b")
    assert digest(manager) == before


def test_the_device_pool_can_be_filled_exactly_by_a_swap_in() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=1, num_host_blocks=2, prefix_caching=False))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.swap_out("a")
    manager.open("b", [9])
    manager.append("b", 1)
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="2 blocks requested, 1 can be had"):
        manager.swap_in("a")
    assert digest(manager) == before
    manager.close("b")
    assert len(manager.swap_in("a")) == 2


def test_hits_that_nobody_holds_count_against_a_swap_in() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=1, num_host_blocks=2))
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.swap_out("a")
    manager.open("b", [9])
    manager.append("b", 1)  # It takes block 1; block 0 is still cached.
    before = digest(manager)
    with pytest.raises(OutOfBlocksError, match="2 blocks requested, 1 can be had"):
        manager.swap_in("a")
    assert digest(manager) == before


def test_a_sequence_without_blocks_swaps_without_a_host_pool() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=1, block_size=1))
    manager.open("a", [1])
    assert len(manager.swap_out("a")) == 0
    assert len(manager.swap_in("a")) == 0
    assert manager.append("a", 1).slots.tolist() == [0]


def test_a_swapped_sequence_can_be_extended_and_closed(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    manager.extend("a", [4])
    manager.swap_in("a")
    manager.append("a", 1)
    assert manager.open("b", [1, 2, 3, 4, 5]) == 4
    manager.swap_out("a")
    manager.close("a")
    assert manager.statistics().num_host_used == 0
    manager.check_invariants()


# Resetting


def test_reset_is_refused_while_a_lookup_is_pinned(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2])
    manager.append("a", 2)
    manager.close("a")
    with manager.lookup([1, 2, 3]):
        assert manager.reset_prefix_cache() is False
    assert manager.reset_prefix_cache() is True
    assert manager.open("b", [1, 2, 3]) == 0


def test_a_swapped_sequence_survives_a_reset(manager: KVCacheManager) -> None:
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    manager.swap_out("a")
    assert manager.reset_prefix_cache() is True
    assert len(manager.swap_in("a")) == 2
    assert manager.open("b", [1, 2, 3]) == 2
    manager.check_invariants()
