"""Plans whose size does not depend on lengths: what a captured CUDA graph needs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from agreement import check
from batches import Batch, one_thread
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.attention import AttentionArgumentError, AttentionPlan, backend_info, paged_attention, plan
from pagedkv.attention.partition import Partition, make_plan

BACKENDS = [info.name for info in backend_info() if info.is_available and info.name != "triton"]


def planned(lens: list[int], query_lens: list[int], **options: object) -> AttentionPlan:
    starts = np.cumsum([0, *query_lens], dtype=np.int32)
    return plan(np.array(lens, np.int32), starts, num_q_heads=4, num_kv_heads=1, **options)  # type: ignore[arg-type]


@given(st.data())
def test_the_size_depends_on_the_query_tokens_alone(data: st.DataObject) -> None:
    query_lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    partition = Partition(num_workers=3, max_decode_rows=16, query_tile=8, min_split=4, tasks_per_worker=2)
    starts = np.cumsum([0, *query_lens], dtype=np.int32)

    made = []
    for _ in range(3):
        lens = np.array([data.draw(st.integers(0, 300)) for _ in query_lens], np.int32)
        made.append(
            make_plan(lens, starts, partition, heads_per_kv_head=4, causal=True, window=(-1, -1), fixed_size=True)
        )

    assert len({(tasks.shape, merges.shape, counts) for tasks, merges, counts in made}) == 1
    for tasks, merges, counts in made:
        assert tasks[5].max(initial=-1) < max(counts.num_partial_tokens, 1)
        assert merges[2].max(initial=0) <= counts.num_partial_tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_was_taken_over_serves_the_new_lengths(backend: str) -> None:
    first = Batch(lens=((1, 700), (1, 30), (20, 500)), num_kv_heads=2, group=2)
    later = dataclasses.replace(first, lens=((1, 12), (1, 3000), (20, 21)))
    plans = []
    for batch in (first, later):
        lens, query_lens = [n for _, n in batch.lens], [n for n, _ in batch.lens]
        starts = np.cumsum([0, *query_lens], dtype=np.int32)
        heads = {"num_q_heads": 4, "num_kv_heads": 2}
        plans.append(plan(np.array(lens, np.int32), starts, **heads, backend=backend, fixed_size=True))
    before = plans[0].tasks.data_ptr()

    plans[0].take_over(plans[1])

    assert plans[0].tasks.data_ptr() == before
    with one_thread():
        out, lse = paged_attention(**later.tensors(), return_lse=True, plan=plans[0])
        check(later, out, lse)


def test_a_plan_of_another_batch_is_not_taken_over() -> None:
    fixed = planned([500, 5], [1, 1], fixed_size=True)
    before = fixed.tasks.clone()

    with pytest.raises(AttentionArgumentError, match="cannot take over"):
        fixed.take_over(planned([500, 5, 5], [1, 1, 1], fixed_size=True))
    with pytest.raises(AttentionArgumentError, match="both of fixed_size"):
        fixed.take_over(planned([500, 5], [1, 1]))
    assert torch.equal(fixed.tasks, before)


def test_a_plan_that_was_made_in_inference_mode_can_take_over_outside_of_it() -> None:
    with torch.inference_mode():
        made = planned([9000, 5], [1, 1], fixed_size=True)
    later = planned([40, 7], [1, 1], fixed_size=True)

    made.take_over(later)

    assert torch.equal(made.tasks, later.tasks)
    assert torch.equal(made.merges, later.merges)
