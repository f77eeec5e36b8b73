"""Every visible key is in exactly one task of its query token, and the merges put the right parts together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.attention import AttentionArgumentError, plan
from pagedkv.attention.partition import Partition, PlanCounts, make_plan
from pagedkv.attention.reference import visible_keys
from pagedkv.attention.step_plan import check_block_tables, check_lengths

OPEN = (-1, -1)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Ragged:
    """A batch in numbers: (query tokens, length) of each sequence, and how to cut it."""

    lens: tuple[tuple[int, int], ...]
    partition: Partition
    heads_per_kv_head: int = 1
    causal: bool = True
    window: tuple[int, int] = OPEN

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0] + [num_queries for num_queries, _ in self.lens], dtype=np.int32)

    def make(self) -> tuple[np.ndarray, np.ndarray, PlanCounts]:
        return make_plan(
            int32(*(length for _, length in self.lens)),
            self.starts,
            self.partition,
            heads_per_kv_head=self.heads_per_kv_head,
            causal=self.causal,
            window=self.window,
        )


raggeds = st.builds(
    Ragged,
    lens=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=5).map(tuple),
    partition=st.builds(
        Partition,
        num_workers=st.integers(1, 8),
        max_decode_rows=st.sampled_from((0, 1, 4, 100)),
        query_tile=st.sampled_from((1, 3, 5, 100)),
        min_split=st.sampled_from((1, 4, 7, 100)),
        tasks_per_worker=st.integers(1, 4),
        prefill_units=st.sampled_from((1, 3)),
    ),
    heads_per_kv_head=st.sampled_from((1, 3)),
    causal=st.booleans(),
    window=st.tuples(st.sampled_from((-1, 0, 3, 30)), st.sampled_from((-1, 0, 2))),
)


@given(raggeds)
def test_every_visible_key_is_in_one_task_of_its_query_token(ragged: Ragged) -> None:
    tasks, _, _ = ragged.make()

    for seq_idx, (num_queries, length) in enumerate(ragged.lens):
        times = np.zeros((num_queries, length), int)
        for _, first, end, first_key, end_key, _ in tasks[:, tasks[0] == seq_idx].T:
            times[first - ragged.starts[seq_idx] : end - ragged.starts[seq_idx], first_key:end_key] += 1
        visible = visible_keys(num_queries, length, causal=ragged.causal, window=ragged.window).numpy()
        assert (times[visible] == 1).all()
        assert times.max(initial=0) <= 1


@given(raggeds)
def test_tasks_stay_in_their_sequence_and_no_query_token_is_left_out(ragged: Ragged) -> None:
    tasks, _, _ = ragged.make()

    asked = np.zeros(int(ragged.starts[-1]), bool)
    for seq_idx, first, end, first_key, end_key, _ in tasks.T:
        assert ragged.starts[seq_idx] <= first < end <= ragged.starts[seq_idx + 1]
        assert 0 <= first_key <= end_key <= ragged.lens[seq_idx][1]
        asked[first:end] = True
    # Also where no key is visible: somebody has to write the zeros.
    assert asked.all()


@given(raggeds)
def test_partial_results_lie_one_after_the_other_and_each_is_merged_once(ragged: Ragged) -> None:
    tasks, merges, counts = ragged.make()

    expected = {}
    for first, end, partial_idx, num_splits in merges.T.tolist():
        assert num_splits > 1
        for split in range(num_splits):
            expected[partial_idx + split * (end - first)] = (first, end)
    partial = tasks[:, tasks[5] >= 0]
    assert {int(task[5]): (int(task[1]), int(task[2])) for task in partial.T} == expected
    assert len(expected) == partial.shape[1]
    places = sorted((idx, idx + end - first) for idx, (first, end) in expected.items())
    assert [start for start, _ in places] == [0, *(end for _, end in places)][: len(places)]
    assert counts.num_partial_tokens == (places[-1][1] if places else 0)


@given(raggeds)
def test_a_query_token_writes_straight_out_once_or_is_merged_once(ragged: Ragged) -> None:
    tasks, merges, _ = ragged.make()

    written = np.zeros(int(ragged.starts[-1]), int)
    for _, first, end, _, _, partial_idx in tasks.T:
        written[first:end] += partial_idx < 0
    for first, end, _, _ in merges.T:
        written[first:end] += 1
    assert (written == 1).all()


@given(raggeds)
def test_there_are_no_more_tasks_than_the_target_and_one_per_tile(ragged: Ragged) -> None:
    tasks, merges, counts = ragged.make()

    partition = ragged.partition
    rows = [num_queries * ragged.heads_per_kv_head for num_queries, _ in ragged.lens]
    is_decode = [0 < row <= partition.max_decode_rows for row in rows]
    num_prefill_tiles = sum(
        -(-num_queries // partition.query_tile)
        for (num_queries, _), decodes in zip(ragged.lens, is_decode, strict=True)
        if num_queries and not decodes
    )
    target = partition.num_workers * partition.tasks_per_worker
    assert counts.num_decode_tasks <= target + sum(is_decode)
    assert counts.num_prefill_tasks <= target + num_prefill_tiles
    assert counts.num_decode_tasks + counts.num_prefill_tasks == tasks.shape[1]
    assert counts.num_merges == merges.shape[1]
    decoding = {seq_idx for seq_idx, decodes in enumerate(is_decode) if decodes}
    assert {int(seq_idx) for seq_idx in tasks[0, : counts.num_decode_tasks]} == decoding


def test_one_long_decode_is_cut_among_all_workers() -> None:
    tasks, merges, counts = Ragged(((1, 100),), Partition(4, 8, 64, 10, tasks_per_worker=1)).make()

    # 100 keys for four workers in multiples of 10.
    assert tasks[3:5].T.tolist() == [[0, 30], [30, 60], [60, 90], [90, 100]]
    assert tasks[5].tolist() == [0, 1, 2, 3]
    assert merges.T.tolist() == [[0, 1, 0, 4]]
    assert counts == PlanCounts(4, 0, 1, 4)


def test_a_sequence_of_ten_times_the_length_gets_ten_times_the_splits() -> None:
    tasks, merges, _ = Ragged(((1, 10), (1, 100)), Partition(11, 8, 64, 10, tasks_per_worker=1)).make()

    assert np.bincount(tasks[0]).tolist() == [1, 10]
    assert merges.T.tolist() == [[1, 2, 0, 10]]


def test_a_prefill_whose_heads_keep_the_workers_busy_is_split_later_than_a_decode() -> None:
    """Each split is one more result to write, read and merge."""
    lens = ((1, 60), (64, 60))
    splits = [
        np.bincount(Ragged(lens, Partition(4, 8, 64, 10, 1, prefill_units=units)).make()[0][0]).tolist()
        for units in (1, 2, 4)
    ]

    # 120 keys for four workers: 30 to a task of all heads, and as many times more as workers share the task.
    assert splits == [[2, 2], [2, 1], [2, 1]]


@pytest.mark.parametrize("lens", [((20, 100),), ((20, 100), (1, 3))])
def test_a_long_prefill_is_split_where_no_decode_is(lens: tuple[tuple[int, int], ...]) -> None:
    tasks, _, counts = Ragged(lens, Partition(4, 8, 64, 10, tasks_per_worker=1, prefill_units=2)).make()

    prefill = tasks[:, counts.num_decode_tasks :]
    assert prefill[3:5].T.tolist() == [[0, 60], [60, 100]]


def test_decodes_that_are_not_split_come_longest_first() -> None:
    tasks, _, _ = Ragged(((1, 5), (1, 50), (1, 20)), Partition(1, 8, 64, 100)).make()

    assert tasks[0].tolist() == [1, 2, 0]
    assert tasks[5].tolist() == [-1, -1, -1]


def test_tiles_of_equal_length_stay_in_order_and_sequences_without_queries_get_none() -> None:
    tasks, _, _ = Ragged(((5, 9), (1, 6), (0, 70), (5, 9), (1, 6)), Partition(4, 2, 5, 100)).make()

    assert tasks.T.tolist() == [
        [1, 5, 6, 0, 6, -1], [4, 11, 12, 0, 6, -1], [0, 0, 5, 0, 9, -1], [3, 6, 11, 0, 9, -1],
    ]  # fmt: skip


def test_decodes_come_before_prefills() -> None:
    tasks, _, counts = Ragged(((8, 8), (1, 3)), Partition(1, 2, 4, 100)).make()

    assert tasks.T.tolist() == [[1, 8, 9, 0, 3, -1], [0, 4, 8, 0, 8, -1], [0, 0, 4, 0, 4, -1]]
    assert counts == PlanCounts(1, 2, 0, 0)


def test_keys_behind_the_window_are_in_no_task() -> None:
    tasks, _, _ = Ragged(((1, 1000),), Partition(1, 8, 64, 100), window=(15, 0)).make()

    assert tasks.T.tolist() == [[0, 0, 1, 984, 1000, -1]]


@pytest.mark.parametrize("widest", [2**30, 2**31 - 1, 2**62])
def test_a_window_wider_than_any_sequence_is_none(widest: int) -> None:
    made = plan(
        int32(5, 9),
        int32(0, 1, 4),
        num_q_heads=1,
        num_kv_heads=1,
        causal=False,
        window=(widest, widest),
        backend="reference",
    )

    assert made.window == OPEN
    assert made.tasks[3:5].T.tolist() == [[0, 9], [0, 5]]


def test_a_plan_says_what_it_was_made_for() -> None:
    made = plan(
        int32(5, 9), int32(0, 1, 4), num_q_heads=4, num_kv_heads=2, window=(7, None), causal=False, backend="reference"
    )

    assert (made.num_seqs, made.num_tokens, made.max_query_len, made.heads) == (2, 4, 3, (4, 2))
    assert (made.causal, made.window, made.backend) == (False, (7, -1), "reference")


def test_a_plan_of_nothing_has_no_tasks() -> None:
    made = plan(int32(), int32(0), num_q_heads=1, num_kv_heads=1, backend="reference")

    assert made.tasks.shape == (6, 0)
    assert (made.num_tokens, made.max_query_len) == (0, 0)


@pytest.mark.parametrize(
    ("seq_lens", "starts", "message"),
    [
        (int32(1, 1), int32(0, 1), r"one more entry than seq_lens \(2\), found 2"),
        (int32(-1), int32(0, 1), "must not be negative, found -1"),
        (int32(1), int32(1, 2), "must start with 0"),
        (int32(1, 1), int32(0, 2, 1), "never fall"),
    ],
)
def test_lengths_of_no_batch_are_refused(seq_lens: np.ndarray, starts: np.ndarray, message: str) -> None:
    with pytest.raises(AttentionArgumentError, match=message):
        plan(seq_lens, starts, num_q_heads=1, num_kv_heads=1)


def test_lengths_must_add_up_to_the_query_tokens() -> None:
    with pytest.raises(AttentionArgumentError, match=r"number of query tokens \(3\), found 2"):
        check_lengths(int32(4), int32(0, 2), 3)


def check(tables: list[list[int]], lens: list[int], *, num_queries: int = 1, window_left: int = -1) -> None:
    starts = np.arange(len(lens) + 1, dtype=np.int32) * np.int32(num_queries)
    check_block_tables(
        np.array(tables, np.int32), int32(*lens), starts, num_blocks=4, block_size=2, window_left=window_left
    )


def test_table_entries_that_are_read_must_be_blocks() -> None:
    check([[3, 0], [1, 2]], [4, 3])
    for entry in (4, -1, 2**31 - 1, -(2**31)):
        with pytest.raises(
            AttentionArgumentError, match=rf"block_tables\[1, 1\] = {entry} is no block: the cache has 4"
        ):
            check([[3, 0], [1, entry]], [4, 3])


def test_table_entries_that_are_not_read_may_hold_anything() -> None:
    check([[3, -9]], [2])
    check([[-9, 99]], [4], num_queries=0)
    check([[-9, 99, 1]], [6], window_left=1)


def test_an_entry_at_the_windows_edge_is_looked_at() -> None:
    with pytest.raises(AttentionArgumentError, match=r"block_tables\[0, 1\] = 99"):
        check([[-9, 99, 1]], [6], window_left=2)


def test_a_table_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(AttentionArgumentError, match=r"sequence 0 has 5 tokens and needs 3 blocks of 2, .* 2 columns"):
        check([[0, 0]], [5])


def test_without_tables_a_plan_does_not_look_at_them() -> None:
    plan(int32(500), int32(0, 1), num_q_heads=1, num_kv_heads=1, backend="reference")
    with pytest.raises(AttentionArgumentError, match="given together or not at all"):
        plan(int32(5), int32(0, 1), num_q_heads=1, num_kv_heads=1, block_tables=np.zeros((1, 1), np.int32))


@pytest.mark.parametrize(
    ("rows", "block_size", "num_blocks", "message"),
    [
        (1, 4, 8, "block_tables must have a row for each of 2 seq_lens, found 1"),
        (3, 4, 8, "block_tables must have a row for each of 2 seq_lens, found 3"),
        (2, 0, 8, "block_size must be at least 1 and num_blocks at least 0, found 0 and 8"),
        (2, 4, -1, "block_size must be at least 1 and num_blocks at least 0, found 4 and -1"),
    ],
)
def test_tables_of_another_batch_and_blocks_of_no_size_are_refused(
    rows: int, block_size: int, num_blocks: int, message: str
) -> None:
    sizes = {"num_blocks": num_blocks, "block_size": block_size}
    with pytest.raises(AttentionArgumentError, match=message):
        plan(
            int32(5, 5),
            int32(0, 1, 2),
            num_q_heads=1,
            num_kv_heads=1,
            block_tables=np.zeros((rows, 2), np.int32),
            **sizes,
        )


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(3, 2), (0, 1), (1, 0)])
def test_heads_must_divide(num_q_heads: int, num_kv_heads: int) -> None:
    with pytest.raises(AttentionArgumentError, match=rf"q_heads \({num_q_heads}\) must be a multiple"):
        plan(int32(5), int32(0, 1), num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("wrong", [np.zeros(1, np.int64), np.zeros((1, 1), np.int32), [5]])
def test_lengths_must_be_int32_vectors(wrong: object) -> None:
    with pytest.raises(AttentionArgumentError, match="seq_lens must be 1-D int32, found"):
        plan(wrong, int32(0, 1), num_q_heads=1, num_kv_heads=1)  # type: ignore[arg-type]
