"""What is refused, by which words, and that nothing was written by then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_steps import SmallStep, small_step
from torch import Tensor

from pagedkv.attention import (
    AttentionArgumentError,
    BackendUnsupportedError,
    backend_info,
    backends,
    paged_attention,
    plan,
    write_kv,
)
from pagedkv.attention.reference import ReferenceBackend
from pagedkv.errors import InvalidArgumentError, PagedKVError

UNTOUCHED = 7.0


def step_of_two() -> SmallStep:
    """Two sequences in float32: 3 query tokens, 4 query heads of 8, 2 KV heads, blocks of 4."""
    return small_step((2, 5), (1, 3), dtype=torch.float32)


def refusal(step: SmallStep | None = None, *, backend: str | None = "reference", **options: Any) -> str:
    """The message of the AttentionArgumentError that a call raises. Checks that `out` and the caches stayed the same."""
    step = step_of_two() if step is None else step
    options.setdefault("out", torch.full((3, 4, 8), UNTOUCHED))
    before = [step.key_cache.clone(), step.value_cache.clone()]
    with pytest.raises(AttentionArgumentError) as caught:
        paged_attention(*step.tensors, backend=backend, **options)
    if options["out"].device.type != "meta":
        assert (options["out"] == UNTOUCHED).all()
    for cache, old in zip((step.key_cache, step.value_cache), before, strict=True):
        if cache.device.type != "meta":
            torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
    return str(caught.value)


def wrong(**fields: Any) -> str:
    """The message where these fields of the step are replaced: by a tensor, or by what a function makes of the right one."""
    step = step_of_two()
    new = {name: field(getattr(step, name)) if callable(field) else field for name, field in fields.items()}
    return refusal(dataclasses.replace(step, **new))


def test_an_argument_error_is_the_projects_and_a_value_error() -> None:
    assert issubclass(AttentionArgumentError, InvalidArgumentError)
    assert issubclass(AttentionArgumentError, ValueError)
    assert issubclass(BackendUnsupportedError, PagedKVError)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("query", lambda x: x[0], "query must be (tokens, q_heads, head_dim)"),
        ("query", lambda x: x.int(), "query must be of floats"),
        ("query", lambda x: x.bfloat16(), "key_cache is torch.float32, query is torch.bfloat16"),
        ("query", lambda x: x[..., :4], "key_cache holds heads of 8, query has 4"),
        ("query", lambda x: x[:, :3], "q_heads (3) must be a multiple of kv_heads (2)"),
        ("query", lambda x: x[:, :0], "q_heads (0) must be a multiple of kv_heads (2)"),
        ("key_cache", lambda x: x[0], "key_cache must be (blocks, block_size, kv_heads, head_dim)"),
        ("key_cache", lambda x: x.int(), "key_cache is torch.int32, which is no cache format"),
        ("key_cache", lambda x: x.transpose(2, 3), "key_cache must be contiguous within a head"),
        ("value_cache", lambda x: x[1:], "value_cache must agree with key_cache in dtype, blocks"),
        ("value_cache", lambda x: x.half(), "value_cache must agree with key_cache in dtype"),
        ("value_cache", lambda x: x[..., :0], "value_dim must be in 1..1024, found 0"),
        ("block_tables", lambda x: x.long(), "block_tables must be 2-D int32"),
        ("block_tables", lambda x: x[0], "block_tables must be 2-D int32"),
        ("block_tables", lambda x: x[:1], "2 seq_lens need as many rows of block_tables"),
        ("seq_lens", lambda x: x.long(), "seq_lens must be 1-D int32"),
        ("seq_lens", lambda x: x[:1], "1 seq_lens need as many rows of block_tables"),
        ("query_start_loc", lambda x: x[:2], "one more query_start_loc, found 2 and 2"),
        ("query_start_loc", lambda x: x.float(), "query_start_loc must be 1-D int32"),
    ],
)
def test_tensors_of_the_wrong_shape_or_dtype_are_named(
    field: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    assert message in wrong(**{field: change})


@pytest.mark.parametrize("field", ["query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc"])
def test_what_is_no_tensor_is_named(field: str) -> None:
    step = step_of_two()
    tensor = getattr(step, field)
    for value, kind in ((tensor.numpy(), "numpy.ndarray"), (tensor.tolist(), "builtins.list")):
        with pytest.raises(AttentionArgumentError, match=f"{field} must be a torch tensor, found {kind}"):
            paged_attention(*dataclasses.replace(step, **{field: value}).tensors)


@pytest.mark.parametrize("field", ["key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc"])
def test_tensors_on_another_device_are_named(field: str) -> None:
    assert f"{field} is on meta, expected cpu" in wrong(**{field: lambda x: x.to("meta")})


def test_blocks_are_of_256_tokens_at_most() -> None:
    wide = torch.zeros(1, 257, 2, 8)

    assert "key_cache has blocks of 257, supported are 1..256" in wrong(key_cache=wide, value_cache=wide)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("seq_lens", [5, -1], "seq_lens must not be negative, found -1"),
        ("query_start_loc", [0, 3, 2], "must start with 0 and never fall"),
        ("query_start_loc", [1, 2, 3], "must start with 0 and never fall"),
        ("query_start_loc", [0, 1, 2], "must end with the number of query tokens (3), found 2"),
        ("block_tables", [[0, 4, 0], [1, 2, 0]], "block_tables[0, 1] = 4 is no block: the cache has 4"),
        ("block_tables", [[0, 1, 0], [-1, 2, 0]], "block_tables[1, 0] = -1 is no block"),
        ("block_tables", [[0], [1]], "sequence 0 has 5 tokens and needs 2 blocks of 4"),
    ],
)
def test_values_that_do_not_fit_are_named(field: str, values: list[Any], message: str) -> None:
    step = step_of_two()
    step = dataclasses.replace(step, key_cache=step.key_cache[:4], value_cache=step.value_cache[:4])

    assert message in refusal(dataclasses.replace(step, **{field: torch.tensor(values, dtype=torch.int32)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": torch.zeros(2)}, "sinks must be (4,)"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "sinks must be float32"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta"),
        ({"alibi_slopes": torch.zeros(4, 1)}, "alibi_slopes must be (4,)"),
        ({"scale": float("nan")}, "scale must be finite, or None, found nan"),
        ({"sinks": np.zeros(4, np.float32)}, "sinks must be a torch tensor, found numpy.ndarray"),
        ({"scale": "x"}, "scale must be finite, or None, found 'x'"),
        ({"softcap": "x"}, "softcap must be above 0 and finite, or None, found 'x'"),
        ({"scale": float("-inf")}, "scale must be finite, or None, found -inf"),
        ({"softcap": 0.0}, "softcap must be above 0 and finite, or None, found 0.0"),
        ({"softcap": float("inf")}, "softcap must be above 0 and finite, or None, found inf"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"softcap": float("nan")}, "softcap must be above 0"),
        ({"window": 5}, "window must be (left, right) or None, found 5"),
        ({"window": (1, 2, 3)}, "window must be (left, right) or None"),
        ({"window": (-1, 0)}, "a side of window must be a whole number of keys or None, found -1"),
        ({"window": (2.5, 0)}, "found 2.5"),
        ({"window": (True, 0)}, "found True"),
        ({"tree_mask": torch.zeros(3, dtype=torch.int32)}, "tree_mask must be (tokens, words)"),
        ({"tree_mask": torch.zeros(2, 1, dtype=torch.int32)}, "tree_mask must be (tokens, words)"),
        ({"tree_mask": torch.zeros(3, 1, dtype=torch.int64)}, "tree_mask must be int32"),
        ({"tree_mask": torch.zeros(3, 0, dtype=torch.int32)}, "tree_mask has 0 words of 32 bits"),
        ({"tree_mask": torch.zeros(3, 1, dtype=torch.int32), "window": (1, 0)}, "goes with neither window nor"),
        ({"tree_mask": torch.zeros(3, 1, dtype=torch.int32), "causal": False}, "tree_mask needs causal=True"),
        ({"tree_mask": torch.zeros(3, 1, dtype=torch.int32), "alibi_slopes": torch.zeros(4)}, "nor alibi_slopes"),
        ({"k_scale": torch.tensor(1.0)}, "k_scale is given, but a cache of plain floats has no scales"),
        (
            {"out": torch.full((3, 4, 7), UNTOUCHED)},
            "out must be (3, 4, 8) torch.float32, found torch.float32 (3, 4, 7)",
        ),
        ({"out": torch.full((3, 4, 8), UNTOUCHED, dtype=torch.float64)}, "out must be (3, 4, 8) torch.float32"),
        ({"out": torch.zeros(3, 4, 8, device="meta")}, "out is on meta"),
        ({"out": torch.full((1, 4, 8), UNTOUCHED).expand(3, 4, 8)}, "out must not be expanded"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    assert message in refusal(**options)


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        (torch.int8, None, "an int8 cache needs k_scale"),
        (torch.int8, torch.zeros(4), "k_scale of an int8 cache must be (4, 4, 2), found (4,)"),
        (torch.int8, torch.zeros(4, 4, 2).half(), "k_scale must be float32"),
        (torch.int8, torch.zeros(4, 4, 2, device="meta"), "k_scale is on meta"),
        (torch.uint8, None, "an int4 cache needs k_scale"),
        (torch.uint8, torch.zeros(4, 4, 2, 3, 2).bfloat16(), "groups of an even number of the 16 channels"),
        (torch.uint8, torch.zeros(4, 4, 2, 16, 2).bfloat16(), "groups of an even number of the 16 channels"),
        (torch.uint8, torch.zeros(4, 4, 2, 1, 2), "k_scale of an int4 cache must be bfloat16"),
        (torch.float8_e4m3fn, torch.zeros(3), "k_scale of an fp8_e4m3 cache must be () or (2,), found (3,)"),
    ],
)
def test_scales_that_do_not_fit_are_named(dtype: torch.dtype, scale: Tensor | None, message: str) -> None:
    step = step_of_two()
    packing = 2 if dtype == torch.uint8 else 1
    cache = torch.zeros(4, 4, 2, 8).to(dtype)
    query = torch.zeros(3, 4, 8 * packing)
    step = dataclasses.replace(step, query=query, key_cache=cache, value_cache=cache)

    with pytest.raises(AttentionArgumentError) as caught:
        paged_attention(*step.tensors, k_scale=scale, v_scale=scale, backend="reference")

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "causal: True in the plan, False in the call"),
        ({"window": (3, 0)}, "window: (-1, -1) in the plan, (3, 0) in the call"),
        ({"backend": "torch"}, "the plan was made for the reference backend, asked is torch"),
    ],
)
def test_a_plan_of_another_call_is_refused(options: dict[str, Any], message: str) -> None:
    step = step_of_two()
    made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend="reference")

    assert message in refusal(step, plan=made, **{"backend": None, **options})


@pytest.mark.parametrize(
    ("lens", "heads", "message"),
    [
        (((2, 5), (1, 3), (0, 0)), (4, 2), "sequences: 3 in the plan, 2 in the call"),
        (((2, 5), (2, 3)), (4, 2), "query tokens: 4 in the plan, 3 in the call"),
        (((2, 5), (1, 3)), (8, 2), "(q_heads, kv_heads): (8, 2) in the plan, (4, 2) in the call"),
        (((2, 6), (1, 3)), (4, 2), "it was made for other seq_lens"),
        (((1, 5), (2, 3)), (4, 2), "it was made for other query_start_loc"),
    ],
)
def test_a_plan_of_another_step_is_refused(
    lens: tuple[tuple[int, int], ...], heads: tuple[int, int], message: str
) -> None:
    other = small_step(*lens)
    made = plan(other.seq_lens, other.query_start_loc, num_q_heads=heads[0], num_kv_heads=heads[1], backend="reference")

    assert f"the plan is of another step: {message}" in refusal(plan=made, backend=None)


def test_a_plan_on_another_device_is_refused() -> None:
    step = step_of_two()
    made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend="reference")

    message = refusal(step, plan=dataclasses.replace(made, tasks=made.tasks.to("meta")), backend=None)

    assert message == "the plan is on meta, query on cpu"


def test_a_backend_that_nobody_knows_is_refused_with_those_that_are() -> None:
    message = refusal(backend="abacus")

    names = ", ".join(info.name for info in backend_info())
    assert message == f"backend must be one of {names}, found 'abacus'"


class Stubborn(ReferenceBackend):
    """A backend that refuses calls with ALiBi, and may be missing."""

    name = "stubborn"
    missing: str | None = None

    def unavailable(self) -> str | None:
        return self.missing

    def refuses(self, features: Any) -> str | None:
        return "it knows no ALiBi" if features.has_alibi else None


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Stubborn:
    """A backend that is asked first."""
    backend = Stubborn()
    registry = {"stubborn": backend, "reference": ReferenceBackend()}
    monkeypatch.setattr(backends, "_REGISTRY", registry)
    return backend


def test_a_backend_asked_by_name_says_what_it_cannot_do(stubborn: Stubborn) -> None:
    with pytest.raises(BackendUnsupportedError, match="the stubborn backend cannot serve this call: it knows no ALiBi"):
        paged_attention(*step_of_two().tensors, alibi_slopes=torch.zeros(4), backend="stubborn")


def test_a_backend_that_refuses_is_passed_over_where_none_is_asked_for(stubborn: Stubborn) -> None:
    out = paged_attention(*step_of_two().tensors, alibi_slopes=torch.zeros(4))

    assert isinstance(out, Tensor)


def test_a_missing_backend_is_passed_over_unless_asked_for(stubborn: Stubborn) -> None:
    stubborn.missing = "nobody built it"

    assert [info.is_available for info in backend_info()] == [False, True]
    paged_attention(*step_of_two().tensors)
    with pytest.raises(BackendUnsupportedError, match="nobody built it") as caught:
        paged_attention(*step_of_two().tensors, backend="stubborn")
    assert (caught.value.backend, caught.value.reason) == ("stubborn", "nobody built it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": None}, "value and value_cache are given both or, for a latent cache, neither"),
        ({"key": torch.ones(2, 8)}, "key must be (tokens, kv_heads, head_dim)"),
        ({"key": torch.ones(2, 2, 8).int()}, "key must be of floats"),
        ({"key": np.ones((2, 2, 8), np.float32)}, "key must be a torch tensor, found numpy.ndarray"),
        ({"value": np.ones((2, 2, 8), np.float32)}, "value must be a torch tensor, found numpy.ndarray"),
        ({"slot_mapping": [1, 2]}, "slot_mapping must be a torch tensor, found builtins.list"),
        ({"value": torch.ones(2, 2, 8).half()}, "value must be torch.float32, as key is"),
        ({"value": torch.ones(2, 2, 8).int()}, "value must be of floats"),
        ({"value": torch.ones(3, 2, 8)}, "value (3, 2, 8) does not fit 2 tokens and value_cache (3, 4, 2, 8)"),
        ({"key": torch.ones(2, 1, 8)}, "key (2, 1, 8) does not fit 2 tokens and key_cache (3, 4, 2, 8)"),
        ({"value_cache": torch.zeros(2, 4, 2, 8)}, "does not match key_cache"),
        ({"key_cache": torch.zeros(3, 4, 2, 8).half()}, "key is torch.float32, key_cache is torch.float16"),
        ({"slot_mapping": torch.tensor([1])}, "slot_mapping must be (2,)"),
        ({"slot_mapping": torch.tensor([1, 2]).int()}, "slot_mapping must be int64"),
        ({"slot_mapping": torch.tensor([1, 12])}, "slot_mapping must be in -1..11, found 1..12"),
        ({"slot_mapping": torch.tensor([-2, 1])}, "slot_mapping must be in -1..11, found -2..1"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64, device="meta")}, "slot_mapping is on meta"),
        ({"key_cache": torch.zeros(3, 4, 2, 8, device="meta")}, "key_cache is on meta, expected cpu"),
        ({"k_scale": torch.tensor(1.0)}, "k_scale is given, but a cache of plain floats has no scales"),
        ({"backend": "abacus"}, "found 'abacus'"),
    ],
)
def test_a_write_that_does_not_fit_is_named_and_writes_nothing(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "key": torch.ones(2, 2, 8),
        "value": torch.ones(2, 2, 8),
        "key_cache": torch.zeros(3, 4, 2, 8),
        "value_cache": torch.zeros(3, 4, 2, 8),
        "slot_mapping": torch.tensor([1, 2]),
        "backend": "reference",
    } | changes

    with pytest.raises(AttentionArgumentError) as caught:
        write_kv(**arguments)

    assert message in str(caught.value)
    for name in ("key_cache", "value_cache"):
        if arguments[name].device.type == "cpu":
            assert not arguments[name].any()


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "value_dim", "message"),
    [
        (1, 1025, 8, "head_dim must be in 1..1024, found 1025"),
        (1, 8, 1025, "value_dim must be in 1..1024, found 1025"),
        (2, 0, 8, "head_dim must be in 1..1024, found 0"),
        (2, 8, 0, "value_dim must be in 1..1024, found 0"),
        (0, 8, 8, "key_cache must have a head, found torch.int8 (1, 4, 0, 8)"),
    ],
)
def test_a_write_of_no_heads_or_of_heads_that_no_kernel_has_room_for_is_refused(
    num_heads: int, head_dim: int, value_dim: int, message: str
) -> None:
    sizes = (head_dim, value_dim)
    new = [torch.ones(1, num_heads, dim) for dim in sizes]
    caches = [torch.zeros(1, 4, num_heads, dim, dtype=torch.int8) for dim in sizes]
    scales = {"k_scale": torch.zeros(1, 4, num_heads), "v_scale": torch.zeros(1, 4, num_heads)}

    with pytest.raises(AttentionArgumentError) as caught:
        write_kv(*new, *caches, torch.tensor([1]), **scales)

    assert message in str(caught.value)


@pytest.mark.parametrize("dim", [1, 1024])
def test_heads_of_1_and_of_1024_channels_are_written(dim: int) -> None:
    cache, scale = torch.zeros(1, 4, 1, dim, dtype=torch.int8), torch.zeros(1, 4, 1)

    write_kv(torch.ones(1, 1, dim), None, cache, None, torch.tensor([1]), k_scale=scale)

    assert cache.sum() == 127 * dim


def test_int4_scales_that_are_scattered_within_a_head_are_refused() -> None:
    cache = torch.zeros(2, 4, 1, 32, dtype=torch.uint8)
    scattered = torch.zeros(2, 4, 1, 2, 2, dtype=torch.bfloat16).transpose(3, 4)
    tables, one = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)

    with pytest.raises(AttentionArgumentError, match="k_scale must be contiguous within a head"):
        paged_attention(torch.zeros(1, 1, 64), cache, cache, tables, one, starts, k_scale=scattered, v_scale=scattered)
