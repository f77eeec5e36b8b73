"""SIEVE: the hand, the marks, and what the hand passes."""

from pagedkv.eviction import SIEVE


def test_blocks_that_are_never_hit_go_in_order_of_naming(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "c")
    assert cache.order == ["a", "b", "c"]


def test_a_hit_spares_a_block_for_one_sweep(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "c", "a")
    assert cache.order == ["b", "c", "a"]


def test_two_hits_spare_no_longer_than_one(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "c", "a", "a", "b")
    assert cache.order == ["c", "a", "b"]


def test_the_hand_goes_on_behind_its_last_victim(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "c", "a")
    cache.use("d")  # Spares a, evicts b.
    assert cache.order == ["c", "d", "a"]


def test_past_the_block_named_last_the_hand_starts_again_with_the_oldest(chains):
    cache = chains(SIEVE(2), 2)
    cache.use("a", "b", "a")
    cache.use("c")  # Spares a, evicts b, which was named last: c comes after a in the next sweep.
    assert cache.order == ["a", "c"]


def test_the_parent_of_a_victim_waits_for_the_next_sweep(chains):
    cache = chains(SIEVE(4), 4)
    cache.use("abc", "x")
    assert cache.order == ["abc", "x", "ab", "a"]


def test_the_hand_passes_a_held_block_and_leaves_its_mark(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "a")
    held = cache.open("a")
    cache.use("c", "d")  # Passes a, evicts b.
    cache.close(held)
    assert cache.order == ["c", "d", "a"]


def test_the_hand_passes_an_inner_block_and_leaves_its_mark(chains):
    cache = chains(SIEVE(4), 4)
    cache.use("ab", "x", "a", "y")
    assert cache.order == ["ab", "x", "y", "a"]
    cache.use("z")  # Passes a, evicts ab: now a is a leaf behind the hand, still marked.
    assert cache.order == ["x", "y", "z", "a"]
    cache.use("p", "q", "r")
    assert cache.order == ["p", "q", "r", "a"]


def test_a_new_name_starts_without_a_mark(chains):
    cache = chains(SIEVE(3), 3)
    cache.use("a", "b", "a")
    cache.unname("a")
    cache.use("c", "d")  # c takes the block that a had.
    assert cache.order == ["b", "c", "d"]
