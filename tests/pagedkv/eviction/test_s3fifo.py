"""S3-FIFO: probation, promotion, ghosts. In a pool of ten, one block is the small queue's share."""

import pytest

from pagedkv.errors import ConfigError
from pagedkv.eviction import S3FIFO


def test_blocks_that_are_never_hit_go_in_order_of_naming(chains):
    cache = chains(S3FIFO(3), 3)
    cache.use("a", "b", "c")
    assert cache.order == ["a", "b", "c"]


def test_one_hit_is_not_enough_to_leave_the_small_queue(chains):
    cache = chains(S3FIFO(3), 3)
    cache.use("a", "b", "c", "a")
    assert cache.order == ["a", "b", "c"]


def test_two_hits_take_a_block_to_the_main_queue_where_they_count_no_more(chains):
    cache = chains(S3FIFO(3), 3)
    cache.use("a", "b", "c", "a", "a")
    assert cache.order == ["b", "c", "a"]
    cache.use("d")  # Promotes a, evicts b.
    cache.use("e")  # Evicts c.
    assert cache.order == ["d", "e", "a"]


def test_a_hit_in_the_main_queue_buys_another_round_there(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)  # Two blocks are the small queue's share.
    cache.use("a", "b", "c", "d", "a", "a", "b", "b")
    cache.use("e")  # Promotes a and b, evicts c.
    assert cache.order == ["d", "a", "b", "e"]
    cache.use("a")
    assert cache.order == ["d", "b", "a", "e"]


def test_below_its_share_the_small_queue_loses_nothing_while_the_main_queue_has_a_leaf(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)
    cache.use("a", "b", "c", "d", "a", "a", "b", "b", "c", "c")
    cache.use("e")  # Promotes a, b and c; d alone is less than the share: evicts a.
    assert not cache.has("a")
    assert cache.order == ["d", "b", "c", "e"]


def test_a_held_main_queue_leaves_the_small_queue_to_give(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)
    cache.use("a", "b", "c", "d", "a", "a", "b", "b", "c", "c")
    cache.use("e")
    held = [cache.open("b"), cache.open("c")]
    assert cache.order == ["d", "e"]
    for blocks in held:
        cache.close(blocks)


def test_a_block_that_comes_back_soon_enters_the_main_queue(chains):
    cache = chains(S3FIFO(2), 2)  # One block each, and one ghost.
    cache.use("a", "b", "c")  # Evicts a.
    cache.use("a")  # Evicts b: a was remembered until then, and c is the small queue's own block.
    assert cache.order == ["c", "a"]


def test_ghosts_are_forgotten_oldest_first(chains):
    cache = chains(S3FIFO(3), 3)  # Two ghosts.
    cache.use("a", "b", "c", "d", "e", "f")  # Evicts a, b, c.
    cache.use("a", "f")  # A stranger again: it evicts d and stands behind e and f.
    assert cache.order == ["e", "f", "a"]
    cache.use("d")  # Remembered: it evicts e and enters the main queue.
    cache.use("x")
    assert cache.order == ["a", "x", "d"]


def test_no_more_than_three_hits_are_remembered(chains):
    cache = chains(S3FIFO(4, small_share=0.25), 4)
    cache.use("m", "a", "b", "c", "m", "m")
    cache.use("d")  # m is in the main queue now.
    for _ in range(5):
        cache.use("m")
    policy = cache.pool.policy
    block = int(cache.cache.blocks([b"m"], 1)[0])
    assert policy._frequencies[block] == 3


def test_a_block_that_lost_its_name_and_came_back_as_a_ghost_stands_in_the_main_queue_only(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)
    cache.use("a", "b", "c", "d", "e")  # Evicts a.
    cache.unname("b")
    cache.use("a")  # Takes the block that b had, and enters the main queue.
    assert cache.order == ["c", "d", "a", "e"]


def test_a_block_that_lost_its_name_in_the_main_queue_and_got_another_stands_in_the_small_queue_only(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)
    cache.use("a", "b", "c", "d", "a", "a", "b", "b", "e")  # Promotes a and b, evicts c.
    cache.unname("a")
    cache.use("x")  # Takes the block that a had.
    assert cache.order == ["d", "e", "b", "x"]


def test_a_name_taken_from_the_small_queue_makes_it_smaller(chains):
    cache = chains(S3FIFO(4, small_share=0.5), 4)
    cache.use("a", "b", "c", "d", "a", "a", "b", "b", "e")  # Promotes a and b, evicts c.
    cache.unname("d")
    assert cache.order == ["a", "b", "e"]


def test_a_copy_remembers_what_it_evicts_by_name_and_its_original_does_not(chains):
    cache = chains(S3FIFO(4), 4)
    cache.use("a", "b", "c", "d", "e")  # Evicts a.
    policy = cache.pool.policy
    copy = policy._copy()
    copy.evict(1)
    assert (list(copy._ghost), list(policy._ghost)) == ([b"a", b"b"], [b"a"])


def test_a_branch_goes_from_tail_to_head(chains):
    cache = chains(S3FIFO(4), 4)
    cache.use("abc", "x")
    assert cache.order == ["abc", "ab", "a", "x"]


def test_an_inner_block_is_not_judged_before_it_is_a_leaf(chains):
    cache = chains(S3FIFO(4), 4)
    cache.use("ab", "a", "a", "x", "y")
    assert cache.order == ["ab", "x", "y", "a"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ConfigError, match="small_share must lie between 0 and 1"):
        S3FIFO(4, small_share=share)
