"""The forest of named blocks, and the heap of its evictable leaves."""

import numpy as np
import pytest

from pagedkv.errors import InvariantViolation
from pagedkv.eviction.leaf_heap import LeafHeap
from pagedkv.eviction.prefix_tree import PrefixTree


def blocks(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int64)


@pytest.fixture
def fork() -> PrefixTree:
    """Block 0 continued by blocks 1 and 2, all evictable."""
    tree = PrefixTree(3)
    tree.name(blocks(0), blocks(-1))
    tree.name(blocks(1, 2), blocks(0, 0))
    tree.add(blocks(1, 2, 0))
    return tree


def test_siblings_named_in_one_call_both_keep_their_parent(fork):
    fork.check_invariants()
    assert fork.leaves().tolist() == [1, 2]


def test_a_parent_may_go_after_its_last_child(fork):
    assert fork.evict(2) is None
    assert fork.evict(1) == 0
    assert fork.evict(0) is None
    fork.check_invariants()


def test_siblings_unnamed_in_one_call_free_their_parent_once(fork):
    fork.remove(blocks(1, 2))
    assert fork.unname(blocks(1, 2)).tolist() == [0]
    fork.check_invariants()


def test_a_held_child_keeps_its_parent_from_going(fork):
    fork.evict(2)
    fork.remove(blocks(1, 0))
    assert fork.leaves().tolist() == []
    assert fork.add(blocks(1, 0)).tolist() == [1]


def test_letting_go_reports_leaves_only(fork):
    fork.remove(blocks(0, 1, 2))
    assert fork.add(blocks(2, 1, 0)).tolist() == [2, 1]


def test_a_copy_is_independent(fork):
    fork.copy().evict(1)
    assert fork.leaves().tolist() == [1, 2]


def test_a_named_block_whose_parent_has_no_name_is_found(fork):
    fork._parents[0] = -2
    with pytest.raises(InvariantViolation, match="I7: a named block continues one that has lost its name"):
        fork.check_invariants()


def test_a_wrong_number_of_children_is_found(fork):
    fork._blockers[0] -= 1
    with pytest.raises(InvariantViolation, match="I7: the tree counts other children"):
        fork.check_invariants()


def test_a_wrong_number_of_evictable_blocks_is_found(fork):
    fork.num_evictable = 2
    with pytest.raises(InvariantViolation, match="I2: the tree counts 2 evictable blocks of 3"):
        fork.check_invariants()


def test_a_held_block_with_an_evictable_parent_is_found(fork):
    fork.remove(blocks(1))
    with pytest.raises(InvariantViolation, match="I7: a held block continues one that could be evicted"):
        fork.check_invariants()


def test_the_heap_gives_the_smallest_number_first(fork):
    heap = LeafHeap(fork)
    heap.push(1, 8)
    heap.push(2, 5)
    assert [heap.pop(), heap.pop(), heap.pop()] == [2, 1, None]


def test_the_heap_skips_what_may_not_go(fork):
    heap = LeafHeap(fork)
    heap.push(0, 1)
    heap.push(1, 2)
    assert heap.pop() == 1


def test_an_entry_outlives_a_hit_and_counts_once(fork):
    heap = LeafHeap(fork)
    heap.push(1, 2)
    heap.push(1, 2)
    assert [heap.pop(), heap.pop()] == [1, None]


def test_a_discarded_entry_is_void_and_a_later_one_counts(fork):
    heap = LeafHeap(fork)
    heap.push(1, 2)
    heap.push(2, 3)
    heap.discard(blocks(1))
    heap.push(1, 4)
    assert [heap.pop(), heap.pop(), heap.pop()] == [2, 1, None]


def test_void_entries_never_outnumber_twice_the_blocks(fork):
    heap = LeafHeap(fork)
    longest = 0
    for number in range(1_000):
        heap.push(1, number)
        heap.discard(blocks(1))
        longest = max(longest, len(heap._entries))
    assert longest == 70  # Twice the three blocks, and 64.
    heap.push(2, 1_000)
    heap.check_invariants()
    assert heap.pop() == 2


def test_the_heap_is_squeezed_only_when_as_many_pushes_have_paid_for_it():
    class Counting(LeafHeap):
        num_squeezes = 0

        def _squeeze(self):
            self.num_squeezes += 1
            super()._squeeze()

    heap = Counting(PrefixTree(100))
    for number in range(1_000):
        heap.push(1, number)
        heap.discard(blocks(1))
    assert heap.num_squeezes == 3  # Every 265 pushes: beyond twice the hundred blocks, and 64.


def test_a_heap_out_of_order_is_found(fork):
    heap = LeafHeap(fork)
    heap.push(1, 1)
    heap.push(2, 2)
    heap._entries.reverse()
    with pytest.raises(InvariantViolation, match="I2: the heap of evictable leaves has lost its order"):
        heap.check_invariants()


def test_a_lost_entry_is_found(fork):
    heap = LeafHeap(fork)
    heap.push(1, 1)
    heap._entries.clear()
    with pytest.raises(InvariantViolation, match="I2: 0 live entries"):
        heap.check_invariants()
