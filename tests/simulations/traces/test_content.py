from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.simulations.traces.content import (
    encode_runs,
    expand_runs,
    find_prefix_conflict,
    leading_hits,
    merge_runs,
    number_prefixes,
)


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def pack(requests: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, requests)], dtype=np.int64)
    return int64(*(i for ids in requests for i in ids)), offsets


def test_runs_break_where_ids_jump_and_where_a_request_ends() -> None:
    starts, counts, offsets = encode_runs(*pack([[0, 1, 5], [6, 7], []]))
    assert starts.tolist() == [0, 5, 6]
    assert counts.tolist() == [2, 1, 2]
    assert offsets.tolist() == [0, 2, 3, 3]


def test_expanding_runs_gives_the_ids_back() -> None:
    assert expand_runs(int64(0, 5), int64(2, 1)).tolist() == [0, 1, 5]
    assert expand_runs(int64(), int64()).tolist() == []


def test_touching_runs_of_one_request_become_one_and_those_of_two_stay() -> None:
    starts, counts, offsets = merge_runs(int64(0, 2, 3), int64(2, 1, 1), int64(0, 2, 3))
    assert starts.tolist() == [0, 3]
    assert counts.tolist() == [3, 1]
    assert offsets.tolist() == [0, 1, 2]


def test_merging_leaves_a_count_out_of_range_for_the_check_to_find() -> None:
    starts, counts, _ = merge_runs(int64(0, -5, 0), int64(-5, 5, 1), int64(0, 3))
    assert starts.tolist() == [0, -5]
    assert counts.tolist() == [-5, 6]


@pytest.mark.parametrize(
    "requests",
    [
        [[0, 1, 2], [0, 1, 3], [0, 4]],
        [[5], [5, 6], [5, 6, 7]],
        [[], [3, 2, 1], [3, 2, 0]],
    ],
)
def test_ids_that_always_follow_the_same_ids_are_prefix_ids(requests: list[list[int]]) -> None:
    assert find_prefix_conflict(*encode_runs(*pack(requests))) is None


@pytest.mark.parametrize(
    ("requests", "run"),
    [
        ([[0, 1], [5, 1]], 2),  # 1 after 0 (inside a run), and after 5
        ([[0, 9], [1, 9]], 3),  # 9 after 0, and after 1
        ([[1, 2], [2]], 1),  # 2 after 1, and first
        ([[1, 2, 1]], 1),  # twice in one request
    ],
)
def test_an_id_with_two_predecessors_is_a_conflict(requests: list[list[int]], run: int) -> None:
    assert find_prefix_conflict(*encode_runs(*pack(requests))) == run


def test_numbering_makes_equal_blocks_after_different_prefixes_differ() -> None:
    ids, offsets = pack([[7, 8, 8], [7, 8], [8], []])
    assert number_prefixes(ids, offsets).tolist() == [0, 1, 2, 0, 1, 3]


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=8))
def test_numbered_ids_are_equal_exactly_where_whole_prefixes_are(requests: list[list[int]]) -> None:
    ids, offsets = pack(requests)
    numbered = number_prefixes(ids, offsets)
    names: dict[tuple[int, ...], int] = {}
    expected = [names.setdefault(tuple(r[: k + 1]), len(names)) for r in requests for k in range(len(r))]
    assert numbered.tolist() == expected
    assert find_prefix_conflict(*encode_runs(numbered, offsets)) is None


def test_a_request_hits_the_leading_blocks_that_an_earlier_one_brought() -> None:
    runs = encode_runs(*pack([[0, 1, 2], [0, 1, 3, 4], [9], [], [0, 1, 3, 4, 5]]))
    assert leading_hits(*runs).tolist() == [0, 2, 0, 0, 4]


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8))
def test_hits_equal_those_of_a_set_that_never_forgets(requests: list[list[int]]) -> None:
    ids, offsets = pack(requests)
    prefix_ids = number_prefixes(ids, offsets)
    seen: set[int] = set()
    expected = []
    for begin, end in itertools.pairwise(offsets):
        own = prefix_ids[begin:end].tolist()
        expected.append(next((k for k, i in enumerate(own) if i not in seen), len(own)))
        seen.update(own)
    assert leading_hits(*encode_runs(prefix_ids, offsets)).tolist() == expected
