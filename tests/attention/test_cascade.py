"""A shared prefix read once gives what reading it once per sequence gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_steps import SmallStep, small_step

from pagedkv.attention import (
    AttentionArgumentError,
    CacheFormat,
    cascade_attention,
    format_of,
    paged_attention,
    plan_cascade,
    scale_shape,
    tree_mask_from_parents,
    write_kv,
)

BLOCK_SIZE = 4


def shared_step(*lens: tuple[int, int], num_shared: int = 2, dtype: torch.dtype = torch.float64) -> SmallStep:
    """A small step whose sequences all start with the first one's first blocks."""
    step = small_step(*lens, block_size=BLOCK_SIZE, dtype=dtype)
    asking = step.query_start_loc.diff() > 0
    step.block_tables[asking, :num_shared] = step.block_tables[int(asking.int().argmax()), :num_shared].clone()
    return step


def cascade_of(step: SmallStep, *, num_shared_tokens: int = 8, backend: str = "reference", **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "num_q_heads": step.query.shape[1],
        "num_kv_heads": step.key_cache.shape[2],
        "num_blocks": step.key_cache.shape[0],
        "block_size": BLOCK_SIZE,
    }
    return plan_cascade(
        step.block_tables,
        step.seq_lens,
        step.query_start_loc,
        num_shared_tokens=num_shared_tokens,
        backend=backend,
        **arguments | options,
    )


def check_equal(step: SmallStep, *, backend: str = "reference", atol: float = 1e-13, **options: Any) -> None:
    """Check that a cascade of the step is what `paged_attention` makes of it."""
    for_plan = {name: options[name] for name in ("causal",) if name in options}
    cascade_plan = cascade_of(step, backend=backend, **for_plan)
    expected = paged_attention(*step.tensors, return_lse=True, backend="reference", **options)
    options.pop("causal", None)

    found = cascade_attention(step.query, step.key_cache, step.value_cache, cascade_plan, return_lse=True, **options)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


MIXED = ((1, 9), (5, 17), (1, 12), (9, 30))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 0.7}, {"scale": 0.2}, {"causal": False}, {"sinks": torch.tensor([0.5, 3.0, -1.0, -torch.inf])}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_decodes_and_prefills_after_a_shared_prefix(options: dict[str, Any], backend: str) -> None:
    check_equal(shared_step(*MIXED), backend=backend, **options)


def test_sequences_without_query_tokens_need_not_share() -> None:
    step = shared_step((1, 9), (0, 3), (0, 0), (1, 10))
    step.block_tables[1] = -5

    check_equal(step)


def test_the_first_sequence_may_be_idle() -> None:
    check_equal(shared_step((0, 2), (1, 9), (1, 10)))


def test_nothing_asked_gives_nothing() -> None:
    check_equal(shared_step((0, 9), num_shared=0))


def test_no_shared_tokens_are_plain_attention() -> None:
    step = small_step(*MIXED, block_size=BLOCK_SIZE)
    cascade_plan = cascade_of(step, num_shared_tokens=0)

    found = cascade_attention(step.query, step.key_cache, step.value_cache, cascade_plan)

    assert cascade_plan.prefix is None
    assert torch.equal(found, paged_attention(*step.tensors, backend="reference"))


def test_a_tree_lies_behind_the_prefix() -> None:
    step = shared_step((1, 9), (3, 11))
    tree_mask = tree_mask_from_parents(np.array([-1, -1, 0, 0], np.int32), step.query_start_loc)

    check_equal(step, tree_mask=tree_mask)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_caches_are_shared_too(dtype: torch.dtype) -> None:
    step = shared_step(*MIXED, dtype=torch.float32)
    cache_format = format_of(dtype)
    assert cache_format is not None
    num_blocks, _, num_heads, dim = step.key_cache.shape
    packing = 2 if cache_format is CacheFormat.INT4 else 1
    shape = scale_shape(cache_format, num_blocks, BLOCK_SIZE, num_heads, dim)
    assert shape is not None
    scale_dtype = torch.bfloat16 if cache_format is CacheFormat.INT4 else torch.float32
    k_scale, v_scale = torch.ones(shape, dtype=scale_dtype), torch.ones(shape, dtype=scale_dtype)
    caches = [torch.zeros(num_blocks, BLOCK_SIZE, num_heads, dim // packing).to(dtype) for _ in range(2)]
    slots = torch.arange(num_blocks * BLOCK_SIZE)
    old = [cache.flatten(0, 1).nan_to_num() for cache in (step.key_cache, step.value_cache)]
    write_kv(*old, *caches, slots, k_scale=k_scale, v_scale=v_scale, backend="reference")

    check_equal(replace(step, key_cache=caches[0], value_cache=caches[1]), k_scale=k_scale, v_scale=v_scale, atol=1e-6)


def test_half_precision_is_off_by_its_rounding() -> None:
    check_equal(shared_step(*MIXED, dtype=torch.bfloat16), atol=0.02)


def test_out_is_written_and_returned() -> None:
    step = shared_step(*MIXED)
    out = torch.empty(16, 4, 8, dtype=torch.float64)

    found = cascade_attention(step.query, step.key_cache, step.value_cache, cascade_of(step), out=out)

    assert found is out
    torch.testing.assert_close(out, paged_attention(*step.tensors, backend="reference"), rtol=0, atol=1e-13)


def test_an_out_that_does_not_fit_is_not_written() -> None:
    step = shared_step(*MIXED)
    out = torch.full((16, 4, 7), 7.0, dtype=torch.float64)

    with pytest.raises(AttentionArgumentError, match="out must be"):
        cascade_attention(step.query, step.key_cache, step.value_cache, cascade_of(step), out=out)

    assert (out == 7).all()


def test_the_prefix_is_read_once_for_all() -> None:
    cascade_plan = cascade_of(shared_step(*MIXED))

    assert cascade_plan.prefix is not None
    assert cascade_plan.prefix.seq_lens.tolist() == [8]
    assert cascade_plan.prefix.query_start_loc.tolist() == [0, 16]
    assert cascade_plan.suffix.seq_lens.tolist() == [1, 9, 4, 22]


def test_a_shared_length_that_ends_within_a_block_is_refused() -> None:
    for wrong in (6, -4):
        with pytest.raises(AttentionArgumentError, match=rf"must be a multiple of block_size \(4\), found {wrong}"):
            cascade_of(shared_step(*MIXED), num_shared_tokens=wrong)


def test_blocks_of_no_tokens_and_tables_of_another_batch_are_refused() -> None:
    step = shared_step(*MIXED)

    with pytest.raises(AttentionArgumentError, match="block_size must be at least 1, found 0"):
        cascade_of(step, block_size=0)
    with pytest.raises(AttentionArgumentError, match="a row for each of 4 seq_lens, found 3"):
        cascade_of(replace(step, block_tables=step.block_tables[:3]), num_blocks=None)


def test_sequences_that_start_with_other_blocks_are_refused() -> None:
    step = shared_step(*MIXED)
    step.block_tables[2, 1] = step.block_tables[3, 2]

    with pytest.raises(AttentionArgumentError, match="sequence 2 does not start with the same 2 blocks as the first"):
        cascade_of(step)


def test_query_tokens_among_the_shared_ones_are_refused() -> None:
    with pytest.raises(
        AttentionArgumentError, match="sequence 1 has 7 tokens before its query tokens, fewer than the 8"
    ):
        cascade_of(shared_step((1, 9), (2, 9)))


def test_entries_out_of_range_are_refused_unless_the_check_is_off() -> None:
    step = shared_step((1, 9), (1, 13))
    step.block_tables[1, 2] = 99

    with pytest.raises(AttentionArgumentError, match=r"block_tables\[1, 2\] = 99"):
        cascade_of(step)
    cascade_of(step, num_blocks=None)


def test_a_plan_of_another_step_is_refused() -> None:
    step = shared_step(*MIXED)

    with pytest.raises(AttentionArgumentError, match="query tokens: 16 in the plan, 2 in the call"):
        cascade_attention(step.query[:2], step.key_cache, step.value_cache, cascade_of(step))
