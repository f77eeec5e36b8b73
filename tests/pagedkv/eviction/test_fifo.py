"""FIFO: order of naming, leaves first."""

from pagedkv.eviction import FIFO


def test_the_block_named_first_goes_first(chains):
    cache = chains(FIFO(3), 3)
    cache.use("a", "b", "c")
    assert cache.order == ["a", "b", "c"]


def test_a_hit_changes_nothing(chains):
    cache = chains(FIFO(3), 3)
    cache.use("a", "b", "a")
    assert cache.order == ["a", "b"]


def test_a_block_that_comes_back_goes_to_the_end(chains):
    cache = chains(FIFO(2), 2)
    cache.use("a", "b", "c", "a")
    assert cache.order == ["c", "a"]


def test_a_branch_goes_from_tail_to_head(chains):
    cache = chains(FIFO(4), 4)
    cache.use("abc", "x")
    assert cache.order == ["abc", "ab", "a", "x"]


def test_a_head_outlives_its_youngest_branch(chains):
    cache = chains(FIFO(4), 4)
    cache.use("ab", "x", "ac")
    assert cache.order == ["ab", "x", "ac", "a"]


def test_a_held_branch_keeps_its_head_and_lets_its_other_branches_go(chains):
    cache = chains(FIFO(4), 4)
    cache.use("ab", "x", "ac")
    held = cache.open("ac")
    assert cache.order == ["ab", "x"]
    cache.close(held)
    assert cache.order == ["ab", "x", "ac", "a"]


def test_a_victim_branch_that_is_cut_short_goes_on_where_it_stopped(chains):
    cache = chains(FIFO(4), 4)
    cache.use("abc", "x", "y")
    assert cache.order == ["ab", "a", "x", "y"]


def test_a_name_taken_from_the_tail_makes_its_parent_the_leaf(chains):
    cache = chains(FIFO(4), 4)
    cache.use("ab", "x")
    cache.unname("ab")
    assert cache.order == ["a", "x"]


def test_a_block_that_lost_its_name_and_got_another_has_a_new_place(chains):
    cache = chains(FIFO(2), 2)
    cache.use("a", "b")
    cache.unname("a")
    cache.use("a")
    assert cache.order == ["b", "a"]
