"""Calls that look like one that was checked: done at once, with the same results; and all others, which are checked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from known import TABLE, needs_known_calls
from small_steps import SmallStep, check_close, naive_attention, small_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pagedkv.attention import AttentionArgumentError, AttentionPlan, op, paged_attention, plan, write_kv
from pagedkv.attention.backends import backend_named
from pagedkv.attention.cpu import library

pytestmark = needs_known_calls

NAMES = ("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc")


def step_of_two(**options: Any) -> SmallStep:
    return small_step((1, 5), (1, 30), **{"dtype": torch.float32, **options})


def plan_of(step: SmallStep, **options: Any) -> AttentionPlan:
    return plan(step.seq_lens, step.query_start_loc, num_q_heads=4, num_kv_heads=2, backend="cpu", **options)


def other_layer(step: SmallStep) -> dict[str, Tensor]:
    """Tensors that lie as those of `step`, with other numbers."""
    tensors = dict(zip(NAMES, step.tensors, strict=True))
    for name in ("query", "key_cache", "value_cache"):
        tensors[name] = torch.empty_strided(tensors[name].shape, tensors[name].stride()).copy_(-0.5 * tensors[name])
    return tensors


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("has_out", [True, False])
def test_the_next_layer_is_not_checked_and_gets_its_own_results(
    layout: str, has_out: bool, unchecked: Callable[[], None]
) -> None:
    step = step_of_two(layout=layout)
    made = plan_of(step)
    layer = other_layer(step)
    expected = paged_attention(**layer, return_lse=True, plan=plan_of(step))
    first = paged_attention(*step.tensors, return_lse=True, plan=made)

    unchecked()
    out = torch.empty(2, 4, 8) if has_out else None
    found = paged_attention(**layer, return_lse=True, plan=made, out=out)
    same = paged_attention(*step.tensors, return_lse=True, plan=made)

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(same, first, strict=True))
    assert out is None or found[0] is out
    check_close(first, naive_attention(step), 1e-5)


def test_every_tensor_that_a_call_may_have_comes_from_the_call(unchecked: Callable[[], None]) -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, sinks=torch.zeros(4), alibi_slopes=torch.zeros(4), softcap=3.0, plan=made)
    options: dict[str, Any] = {"softcap": 3.0, "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    expected = paged_attention(*step.tensors, **options, plan=plan_of(step))

    unchecked()

    assert torch.equal(paged_attention(*step.tensors, **options, plan=made), expected)


def test_scales_and_tree_masks_come_from_the_call(unchecked: Callable[[], None]) -> None:
    step = small_step((3, 9), dtype=torch.float32, num_kv_heads=2, group=2)
    made = plan_of(step)
    tensors = dict(zip(NAMES, step.tensors, strict=True))
    for name in ("key_cache", "value_cache"):
        tensors[name] = torch.randint(-127, 128, tensors[name].shape, dtype=torch.int8)
    options = [
        {
            "tree_mask": torch.tensor([[1], [3], [second]], dtype=torch.int32),
            "k_scale": torch.rand(tensors["key_cache"].shape[:3]),
            "v_scale": torch.rand(tensors["key_cache"].shape[:3]),
        }
        for second in (5, 7)
    ]
    expected = [paged_attention(**tensors, **given, plan=plan_of(step)) for given in options]
    paged_attention(**tensors, **options[0], plan=made)

    unchecked()
    found = [paged_attention(**tensors, **given, plan=made) for given in options]

    assert not torch.equal(*expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def changed(tensor: Tensor, how: str) -> Tensor:
    if how == "wider":
        return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1).to(tensor.dtype)[..., :-1].copy_(tensor)
    if how == "double":
        return tensor.double()
    if how == "longer":
        return torch.cat((tensor, tensor[:1]))
    return {"before": tensor[None], "behind": tensor[..., None], "fewer": tensor[..., 0]}[how]


@pytest.mark.parametrize("how", ["wider", "double", "longer", "before", "behind", "fewer"])
@pytest.mark.parametrize("name", [*NAMES, "out", "sinks"])
def test_what_lies_otherwise_is_checked_and_ends_as_without_a_known_call(name: str, how: str) -> None:
    step = step_of_two()
    tensors: dict[str, Any] = dict(zip(NAMES, step.tensors, strict=True))
    tensors |= {"out": torch.empty(2, 4, 8), "sinks": torch.zeros(4)}

    def outcome(made: AttentionPlan) -> tuple[str, Tensor | None]:
        try:
            return "", paged_attention(**(tensors | {name: changed(tensors[name], how)}), plan=made).clone()
        except AttentionArgumentError as error:
            return str(error), None

    fresh, made = plan_of(step), plan_of(step)
    paged_attention(**tensors, plan=made)
    assert made.known is not None
    expected, found = outcome(fresh), outcome(made)

    assert found[0] == expected[0]
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7},
        {"softcap": 0.5},
        {"sinks": torch.ones(4)},
        {"alibi_slopes": torch.ones(4)},
        {"tree_mask": torch.tensor([[1], [1]], dtype=torch.int32)},
        {"return_lse": True},
        {"backend": "cpu"},
    ],
)
def test_a_call_that_asks_something_else_is_not_the_known_one(options: dict[str, Any]) -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)
    expected = paged_attention(*step.tensors, **options, plan=plan_of(step))

    found = paged_attention(*step.tensors, **options, plan=made)

    pairs = zip(found, expected, strict=True) if options.get("return_lse") else [(found, expected)]
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 0)},
        {"causal": False},
        {"backend": "torch"},
        {"backend": "abacus"},
        {"scale": np.ones(2)},
        {"scale": torch.ones(2)},
        {"scale": float("nan")},
        {"softcap": "much"},
        {"sinks": np.ones(4, np.float32)},
        {"out": np.ones((2, 4, 8), np.float32)},
    ],
)
def test_what_is_refused_is_refused_beside_a_known_call(options: dict[str, Any]) -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)

    with pytest.raises(AttentionArgumentError) as found:
        paged_attention(*step.tensors, **options, plan=made)
    with pytest.raises(AttentionArgumentError) as expected:
        paged_attention(*step.tensors, **options, plan=plan_of(step))

    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("value_dim", [8, 6])
@pytest.mark.parametrize("name", NAMES)
def test_none_in_the_place_of_a_tensor_is_refused_by_name(name: str, value_dim: int) -> None:
    step = step_of_two(value_dim=value_dim)
    tensors: dict[str, Any] = dict(zip(NAMES, step.tensors, strict=True))
    made = plan_of(step)
    first = paged_attention(**tensors, plan=made)

    assert torch.equal(paged_attention(**tensors, plan=made), first)
    with pytest.raises(AttentionArgumentError, match=f"{name} must be a torch tensor, found builtins.NoneType"):
        paged_attention(**(tensors | {name: None}), plan=made)


@pytest.mark.parametrize("name", ["seq_lens", "query_start_loc"])
def test_lengths_that_changed_in_place_are_those_of_another_step(name: str) -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)
    getattr(step, name)[1] -= 1

    with pytest.raises(AttentionArgumentError, match=f"the plan is of another step: it was made for other {name}"):
        paged_attention(*step.tensors, plan=made)


def test_the_last_of_the_starts_is_looked_at() -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)
    step.query_start_loc[2] = 3

    with pytest.raises(AttentionArgumentError, match="it was made for other query_start_loc"):
        paged_attention(*step.tensors, plan=made)


class Seen(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_call() -> None:
    step = step_of_two()
    made = plan_of(step)
    new, slots = torch.ones(1, 2, 8), torch.tensor([0])
    paged_attention(*step.tensors, plan=made)
    write_kv(new, new, step.key_cache, step.value_cache, slots)

    with Seen() as seen:
        paged_attention(*step.tensors, plan=made)
        write_kv(new, new, step.key_cache, step.value_cache, slots)

    assert {"pagedkv::paged_attention", "pagedkv::write_kv"} <= set(seen.names)


def test_the_profiler_sees_every_call() -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        paged_attention(*step.tensors, plan=made)

    assert "pagedkv::paged_attention" in {event.name for event in profile.events()}


def test_a_compiled_layer_is_as_good_as_a_known_one() -> None:
    step = step_of_two()
    made = plan_of(step)
    expected = paged_attention(*step.tensors, plan=made)
    assert made.known is not None

    layer = torch.compile(lambda *tensors: paged_attention(*tensors, plan=made) + 1, fullgraph=True, backend="eager")

    assert torch.equal(layer(*step.tensors), expected + 1)


def test_fake_tensors_and_transforms_are_not_read() -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = paged_attention(*(mode.from_tensor(tensor) for tensor in step.tensors), plan=made)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for pagedkv::paged_attention"):
        torch.func.vmap(lambda query: paged_attention(query, *step.tensors[1:], plan=made))(step.query[None])

    assert fake.shape == (2, 4, 8)


def test_a_fake_tensor_among_real_ones_is_not_written_to() -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)

    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors first"):
        paged_attention(*step.tensors, plan=made, out=FakeTensorMode().from_tensor(torch.empty(2, 4, 8)))


def test_a_parameter_is_a_query_like_another() -> None:
    step = step_of_two()
    made = plan_of(step)
    expected = paged_attention(*step.tensors, plan=made)

    found = paged_attention(torch.nn.Parameter(step.query), *step.tensors[1:], plan=made)

    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_a_query_that_is_copied_for_the_kernel_is_checked_each_time() -> None:
    step = step_of_two()
    made = plan_of(step)
    query = step.query.transpose(1, 2).contiguous().transpose(1, 2)
    expected = paged_attention(*step.tensors, plan=plan_of(step))

    for _ in range(2):
        assert torch.equal(paged_attention(query, *step.tensors[1:], plan=made), expected)
        assert made.known is None


def test_a_plan_that_was_taken_over_is_that_of_its_new_lengths() -> None:
    before, after = step_of_two(), small_step((1, 8), (1, 30), dtype=torch.float32)
    made = plan_of(before, fixed_size=True)
    paged_attention(*before.tensors, plan=made)
    made.take_over(plan_of(after, fixed_size=True))

    found = paged_attention(*after.tensors, return_lse=True, plan=made)
    again = paged_attention(*after.tensors, return_lse=True, plan=made)

    check_close(found, naive_attention(after), 1e-5)
    check_close(again, naive_attention(after), 1e-5)
    with pytest.raises(AttentionArgumentError, match="it was made for other seq_lens"):
        paged_attention(*before.tensors, plan=made)


def pickled(made: AttentionPlan) -> AttentionPlan:
    """What comes out of a pickle of our own."""
    other = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert isinstance(other, AttentionPlan)
    return other


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_of_a_plan_serves_too(copied: Callable[[AttentionPlan], AttentionPlan]) -> None:
    step = step_of_two()
    made = plan_of(step)
    expected = paged_attention(*step.tensors, plan=made)
    other = copied(made)
    del made

    for _ in range(2):
        assert torch.equal(paged_attention(*step.tensors, plan=other), expected)


def test_threads_may_share_a_plan() -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)
    layers = [other_layer(step) for _ in range(4)]
    for nth, layer in enumerate(layers):
        layer["value_cache"] *= nth
    expected = [paged_attention(**layer, plan=plan_of(step)) for layer in layers]

    def worker(nth: int) -> bool:
        return all(torch.equal(paged_attention(**layers[nth], plan=made), expected[nth]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(worker, range(4))) == [True] * 4


def test_a_kernel_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of_two()
    made = plan_of(step)
    paged_attention(*step.tensors, plan=made)
    monkeypatch.setattr(backend_named("cpu").kernel, "_attend_known", lambda *_: -1)

    with pytest.raises(MemoryError, match="no memory to work in"):
        paged_attention(*step.tensors, plan=made)


def test_a_torch_without_the_table_checks_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_named("cpu").kernel, "_python", None)
    monkeypatch.setattr(op, "_known_write", None)
    step = step_of_two()
    made = plan_of(step)
    new, slots = torch.ones(1, 2, 8), torch.tensor([0])

    for _ in range(2):
        check_close(paged_attention(*step.tensors, return_lse=True, plan=made), naive_attention(step), 1e-5)
        write_kv(new, new, torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8), slots)
        assert made.known is None
        assert op._known_write is None


def test_a_table_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "DLPACK_MAJOR", 2)

    assert library._python_of(TABLE) is None


@pytest.mark.parametrize("table", [None, 0, object()])
def test_what_is_no_table_is_not_used(table: object) -> None:
    assert library._python_of(table) is None
