"""A prefix that several decodes of a step share is read once by a plan that knows of it, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_steps import SmallStep, small_step

from pagedkv.attention import AttentionArgumentError, AttentionPlan, order_by_prefix, paged_attention, plan
from pagedkv.attention import shared_prefixes as module
from pagedkv.attention.backends import backend_named
from pagedkv.attention.partition import Partition, PlanCounts
from pagedkv.attention.shared_prefixes import make_shared_plan, shared_with_previous

BLOCK_SIZE = 4
needs_kernel = pytest.mark.skipif(backend_named("cpu").unavailable() is not None, reason="no compiled kernel")


def int32s(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture(autouse=True)
def _small_groups_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SAVED", 1)


def shared_step(*lens: tuple[int, int], groups: tuple[tuple[int, int, int], ...], **options: Any) -> SmallStep:
    """A float32 step in which sequences `first` to `end - 1` of each group start with the same `num` blocks."""
    step = small_step(*lens, block_size=BLOCK_SIZE, dtype=torch.float32, **options)
    for first, end, num in groups:
        step.block_tables[first:end, :num] = step.block_tables[first, :num].clone()
    return step


def plan_of(step: SmallStep, **options: Any) -> AttentionPlan:
    lengths, starts = step.seq_lens.numpy(), step.query_start_loc.numpy()
    shared = shared_with_previous(step.block_tables.numpy(), lengths, starts, BLOCK_SIZE)
    heads = {"num_q_heads": step.query.shape[1], "num_kv_heads": step.key_cache.shape[2]}
    return plan(lengths, starts, shared=shared, backend="cpu", **heads, **options)


def check_equal(step: SmallStep, **options: Any) -> AttentionPlan:
    """Check that sharing changes neither results nor LSE; returns the plan."""
    made = plan_of(step)
    expected = paged_attention(*step.tensors, return_lse=True, backend="reference", **options)
    found = paged_attention(*step.tensors, return_lse=True, plan=made, **options)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, atol=2e-6, rtol=0)
    return made


def test_rows_that_start_with_the_same_block_are_put_together_in_order() -> None:
    order = order_by_prefix(np.array([[5, 1], [2, 3], [5, 4], [2, 6]], np.int32))
    assert order is not None
    assert order.tolist() == [1, 3, 0, 2]
    assert order_by_prefix(np.array([[5, 1], [2, 1]], np.int32)) is None


def test_shared_tokens_are_whole_blocks_in_which_nobody_asks() -> None:
    tables = np.array([[1, 2, 3], [1, 2, 4], [1, 2, 4], [7, 2, 4]], np.int32)
    # The third one's query token stands in its second block, which the one before it shares.
    lengths, starts = int32s(9, 12, 8, 9), int32s(0, 1, 2, 3, 4)
    assert shared_with_previous(tables, lengths, starts, 4).tolist() == [0, 8, 4, 0]


def test_equal_entries_behind_the_last_block_are_not_shared() -> None:
    tables = np.array([[1, 0, 0], [1, 0, 0]], np.int32)
    assert shared_with_previous(tables, int32s(6, 12), int32s(0, 1, 2), 4).tolist() == [0, 4]


def test_the_prefix_of_a_group_is_one_task_and_each_sequence_keeps_its_rest() -> None:
    made = make_shared_plan(
        int32s(10, 11, 6), int32s(0, 1, 2, 3), int32s(0, 8, 0), Partition(1, 16, 128, 256), heads_per_kv_head=2
    )
    assert made is not None
    tasks, merges, counts = made
    assert tasks.T.tolist() == [
        [0, 0, 2, 0, 8, 0],  # sequence 0's first eight keys for tokens 0 and 1
        [2, 2, 3, 0, 6, -1],
        [1, 1, 2, 8, 11, 3],
        [0, 0, 1, 8, 10, 2],
    ]
    assert merges.T.tolist() == [[0, 2, 0, 2]]
    assert counts == PlanCounts(num_decode_tasks=4, num_prefill_tasks=0, num_merges=1, num_partial_tokens=4)


@needs_kernel
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"scale": 0.3}],
    ids=["plain", "softcap", "sinks", "scale"],
)
def test_two_groups_and_one_who_shares_nothing(options: dict[str, Any]) -> None:
    step = shared_step((1, 21), (1, 30), (1, 25), (1, 9), (1, 14), (1, 19), groups=((0, 3, 5), (4, 6, 3)))
    made = check_equal(step, **options)
    assert (made.shares_prefixes, made.counts.num_merges) == (True, 2)


@needs_kernel
def test_a_group_of_more_rows_than_a_decode_has() -> None:
    step = shared_step(*[(1, 18 + i % 3) for i in range(40)], groups=((0, 40, 4),))
    assert check_equal(step).counts.num_prefill_tasks == 1


@needs_kernel
def test_several_query_tokens_of_a_row_see_no_later_ones() -> None:
    check_equal(shared_step((3, 20), (2, 19), (1, 17), groups=((0, 3, 4),)))


@needs_kernel
def test_a_long_prefix_is_split_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(2, 16, 128, 8, shares_prefixes=True)
    monkeypatch.setattr(type(backend_named("cpu")), "partition", lambda *_: partition)
    step = shared_step((1, 70), (1, 66), (1, 68), groups=((0, 3, 16),))
    assert check_equal(step).merges[3].tolist() == [5]  # splits of 16 keys, and the rest of each


@needs_kernel
def test_a_prefix_that_saves_too_little_is_read_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SAVED", 17)
    step = shared_step((1, 21), (1, 30), groups=((0, 2, 4),))
    assert not check_equal(step).shares_prefixes


@needs_kernel
@pytest.mark.parametrize("options", [{"causal": False}, {"window": (9, 0)}, {"fixed_size": True}])
def test_nothing_is_shared_where_a_query_must_know_its_distance(options: dict[str, Any]) -> None:
    step = shared_step((1, 21), (1, 30), groups=((0, 2, 4),))
    assert not plan_of(step, **options).shares_prefixes


def test_prefill_chunks_share_nothing() -> None:
    step = shared_step((20, 40), (1, 30), groups=((0, 2, 4),))
    assert not plan_of(step).shares_prefixes


@needs_kernel
def test_slopes_and_trees_are_refused_with_a_shared_plan() -> None:
    step = shared_step((1, 21), (1, 30), groups=((0, 2, 4),))
    made = plan_of(step)
    with pytest.raises(AttentionArgumentError, match="neither tree_mask nor alibi_slopes"):
        paged_attention(*step.tensors, plan=made, alibi_slopes=torch.ones(4))
    with pytest.raises(AttentionArgumentError, match="neither tree_mask nor alibi_slopes"):
        paged_attention(*step.tensors, plan=made, tree_mask=torch.ones((2, 1), dtype=torch.int32))


def test_an_entry_for_each_sequence_is_asked_for() -> None:
    with pytest.raises(AttentionArgumentError, match="an entry for each of 2 seq_lens, found 1"):
        plan(int32s(5, 6), int32s(0, 1, 2), num_q_heads=2, num_kv_heads=2, shared=int32s(0))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (int32s(4, 0, 0), r"shared\[0\] = 4 must be in 0\.\.0"),
        (int32s(0, -1, 0), r"shared\[1\] = -1 must be in 0\.\.8"),
        (int32s(0, 9, 0), r"shared\[1\] = 9 must be in 0\.\.8"),
        (int32s(0, 8, 5), r"shared\[2\] = 5 must be in 0\.\.4"),
        (int32s(0, 5_000_000, 0), r"shared\[1\] = 5000000 must be in 0\.\.8"),
    ],
)
def test_no_more_is_shared_than_both_have_before_their_query_tokens(shared: np.ndarray, message: str) -> None:
    lengths, starts = int32s(9, 12, 6), int32s(0, 1, 2, 4)
    with pytest.raises(AttentionArgumentError, match=message):
        plan(lengths, starts, num_q_heads=2, num_kv_heads=2, shared=shared)


def test_query_tokens_before_the_first_position_share_nothing() -> None:
    tables, lengths, starts = np.array([[1, 2], [1, 2]], np.int32), int32s(2, 8), int32s(0, 3, 4)
    shared = shared_with_previous(tables, lengths, starts, 4)
    assert shared.tolist() == [0, 0]
    plan(lengths, starts, num_q_heads=2, num_kv_heads=2, shared=shared)


def test_shared_tokens_lie_in_the_same_blocks() -> None:
    lengths, starts = int32s(9, 12, 9), int32s(0, 1, 2, 3)
    options = {"num_q_heads": 2, "num_kv_heads": 2, "num_blocks": 9, "block_size": 4}
    tables = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 6]], np.int32)
    plan(lengths, starts, block_tables=tables, shared=int32s(0, 8, 4), **options)
    with pytest.raises(
        AttentionArgumentError, match="sequence 2 does not start with the same 2 blocks as the one before"
    ):
        plan(lengths, starts, block_tables=tables, shared=int32s(0, 8, 5), **options)


@needs_kernel
def test_what_is_shared_may_be_a_tensor() -> None:
    shared = torch.tensor([0, 8], dtype=torch.int32)
    made = plan(int32s(9, 12), int32s(0, 1, 2), num_q_heads=2, num_kv_heads=2, backend="cpu", shared=shared)
    assert made.shares_prefixes
