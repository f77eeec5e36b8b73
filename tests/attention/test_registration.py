"""The two operators as torch sees them: schemas, fake tensors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import divided
from small_steps import SmallStep, small_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pagedkv.attention import AttentionArgumentError, paged_attention, plan, write_kv

BACKENDS = ("reference", "torch")
# A write to an argument has no gradient, so torch's test of registered gradients does not apply.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def step_of_two(dtype: torch.dtype = torch.float32) -> SmallStep:
    return small_step((2, 5), (1, 3), dtype=dtype)


def attention_arguments(
    *, has_lse: bool = True, is_planned: bool = False, backend: str = "reference"
) -> tuple[Any, ...]:
    """What `torch.ops.pagedkv.paged_attention` takes, in order."""
    step = step_of_two()
    made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend=backend)
    planned = (made.tasks, made.merges, made.counts.as_list()) if is_planned else (None, None, [])
    out, lse = torch.zeros(3, 4, 8), torch.zeros(3, 4) if has_lse else None
    # NaN is equal to nothing, not even to itself, and opcheck compares what it finds in the caches.
    caches = [cache.nan_to_num() for cache in (step.key_cache, step.value_cache)]
    tensors = (out, lse, step.query, *caches, step.block_tables, step.seq_lens, step.query_start_loc)
    optional = (torch.zeros(4), None, None, None, None)
    return (*tensors, 0.3, True, -1, -1, 0.0, *optional, *planned, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_lse", [True, False])
@pytest.mark.parametrize("is_planned", [True, False])
def test_attention_passes_torchs_own_checks(backend: str, has_lse: bool, is_planned: bool) -> None:
    arguments = attention_arguments(has_lse=has_lse, is_planned=is_planned, backend=backend)

    results = torch.library.opcheck(torch.ops.pagedkv.paged_attention.default, arguments, test_utils=CHECKS)

    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_passes_torchs_own_checks(backend: str) -> None:
    arguments = (torch.ones(2, 2, 8), torch.ones(2, 2, 8), torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8))

    results = torch.library.opcheck(
        torch.ops.pagedkv.write_kv.default,
        (*arguments, torch.tensor([5, -1]), None, None, True, backend),
        test_utils=CHECKS,
    )

    assert set(results.values()) == {"SUCCESS"}


def test_a_write_of_scales_passes_torchs_own_checks() -> None:
    new, cache, scale = torch.ones(2, 2, 8), torch.zeros(3, 4, 2, 8, dtype=torch.int8), torch.zeros(3, 4, 2)

    results = torch.library.opcheck(
        torch.ops.pagedkv.write_kv.default,
        (new, new, cache, cache.clone(), torch.tensor([5, 0]), scale, scale.clone(), True, "reference"),
        test_utils=CHECKS,
    )

    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_layer_compiles_without_a_break_and_computes_the_same(compiler: str, is_planned: bool) -> None:
    step = step_of_two()
    made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, window=(3, 0), backend="torch")
    options: dict[str, Any] = {"plan": made} if is_planned else {"backend": "torch"}

    def layer(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (step.block_tables, step.seq_lens, step.query_start_loc)
        out, lse = paged_attention(
            query * 2, key_cache, value_cache, *lengths, window=(3, 0), softcap=2.0, return_lse=True, **options
        )
        return out + 1, lse

    expected = layer(step.query, step.key_cache, step.value_cache)

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    found = compiled(step.query, step.key_cache, step.value_cache)

    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_write_and_a_read_of_it_stay_in_order_when_compiled(compiler: str) -> None:
    step = step_of_two()
    # Slots of the three query tokens: positions 3 and 4 of the first sequence, position 2 of the second.
    tables = step.block_tables.tolist()
    slots = torch.tensor([tables[0][0] * 4 + 3, tables[0][1] * 4, tables[1][0] * 4 + 2])
    key, value = torch.ones(3, 2, 8), torch.full((3, 2, 8), 3.0)

    def layer(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        write_kv(key, value, key_cache, value_cache, slots, backend="torch")
        out = paged_attention(
            step.query, key_cache, value_cache, step.block_tables, step.seq_lens, step.query_start_loc, backend="torch"
        )
        assert isinstance(out, Tensor)
        return out

    caches = [(step.key_cache.clone(), step.value_cache.clone()) for _ in range(2)]
    expected = layer(key, value, *caches[0])

    found = torch.compile(layer, fullgraph=True, backend=compiler)(key, value, *caches[1])

    assert torch.equal(found, expected)
    for one, other in zip(caches[0], caches[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_fake_tensors_get_the_right_shapes_and_dtypes(dtype: torch.dtype, lse_dtype: torch.dtype) -> None:
    step = small_step((2, 5), (1, 3), value_dim=6, dtype=dtype)

    with FakeTensorMode() as mode:
        out, lse = paged_attention(
            *(mode.from_tensor(tensor) for tensor in step.tensors), return_lse=True, backend="torch"
        )

    assert (out.shape, out.dtype) == ((3, 4, 6), dtype)
    assert (lse.shape, lse.dtype) == ((3, 4), lse_dtype)


def test_a_fake_write_writes_nothing() -> None:
    with FakeTensorMode():
        new, cache = torch.ones(2, 2, 8), torch.zeros(3, 4, 2, 8)
        write_kv(new, new, cache, cache, torch.tensor([0, 1]), backend="torch")

    assert cache.shape == (3, 4, 2, 8)


def test_the_schema_says_what_is_written() -> None:
    attention = torch.ops.pagedkv.paged_attention.default._schema
    write = torch.ops.pagedkv.write_kv.default._schema

    def written(schema: Any) -> list[str]:
        return [argument.name for argument in schema.arguments if argument.is_write]

    assert written(attention) == ["out", "lse"]
    assert written(write) == ["key_cache", "value_cache", "k_scale", "v_scale"]


def test_steps_that_differ_in_lengths_alone_share_graphs() -> None:
    num_graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch.compiler.reset()
    layer = torch.compile(lambda *tensors, plan: paged_attention(*tensors, plan=plan), fullgraph=True, backend=counting)
    num_tasks = []
    for length in range(20, 180, 20):
        step = small_step((1, length), (1, 5), dtype=torch.float32)
        with divided("torch", 16, None, True):
            made = plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend="torch")
        found = layer(*step.tensors, plan=made)
        num_tasks.append(made.counts.num_decode_tasks)
        assert torch.equal(found, paged_attention(*step.tensors, plan=made))

    assert len(set(num_tasks)) > 3
    assert num_graphs <= 3


def test_a_device_that_no_backend_runs_on_is_named() -> None:
    step = step_of_two()
    tensors = [tensor.to("meta") for tensor in step.tensors]

    with pytest.raises(AttentionArgumentError, match=r"^no backend runs on meta$"):
        paged_attention(*tensors)
    with pytest.raises(AttentionArgumentError, match=r"^no backend runs on meta$"):
        plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, device="meta")
