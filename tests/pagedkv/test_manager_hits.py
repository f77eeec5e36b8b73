"""What a prompt hits, what pins it, and what may never be hit."""

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
    SimulatedPrompt,
)
from pagedkv.eviction import make_policy


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


@pytest.mark.parametrize(("ids", "num_tokens"), [([1, 9, 3], 2), ([1, 2, 3], 6), ([9, 2, 3], 0)])
def test_a_hit_ends_where_simulated_ids_contradict_each_other(ids: list[int], num_tokens: int) -> None:
    manager = KVCacheManager(CacheConfig(8, 2))
    manager.open("a", SimulatedPrompt(7, [1, 2, 3], 2))
    manager.append("a", 7)

    with manager.lookup(SimulatedPrompt(7, ids, 2)) as hit:
        assert hit.num_tokens == num_tokens
    assert manager.open("b", SimulatedPrompt(7, ids, 2)) == num_tokens
    manager.append("b", 7 - num_tokens)
    manager.check_invariants()


@pytest.mark.parametrize("ids", [[1, 9, 3], [9, 3, 4], [3, 4, 5]])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "s3-fifo", "sieve"])
def test_ids_that_contradict_two_prompts_break_no_policy(eviction: str, ids: list[int]) -> None:
    manager = KVCacheManager(CacheConfig(8, 2), eviction=make_policy(eviction, 8), check="full")
    for name, known in (("a", [1, 2, 3]), ("b", [1, 9, 8])):
        hit = manager.open(name, SimulatedPrompt(7, known, 2))
        manager.append(name, 7 - hit)
        manager.close(name)

    manager.append("c", 7 - manager.open("c", SimulatedPrompt(7, ids, 2)))  # Ids of both, all resident in part.
    manager.open("d", SimulatedPrompt(9))
    manager.append("d", 8)
    manager.close("c")

    manager.check_invariants()


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
