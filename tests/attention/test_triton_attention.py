"""The Triton attention kernels in Triton's interpreter: what their own tiles, splits and formats could get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import check, divided
from batches import Batch
from torch import Tensor

from pagedkv.attention import backend_info, pack_tree_mask, paged_attention, plan
from pagedkv.attention.backends import backend_named, pick_for_device
from pagedkv.attention.partition import PlanCounts
from pagedkv.attention.triton_kernels import is_interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not is_interpreted(), reason="Triton compiles here: benchmarks/gpu_check.py checks that"
)

# A decode of several tiles of 16 keys, one that ends inside a tile, a sequence without queries, and one without keys.
DECODES = ((1, 37), (1, 16), (0, 9), (1, 0))
# A prefill of two tiles, either of which begins and ends in different tiles of keys, next to a decode; and one that has
# more query tokens than keys.
MIXED = ((1, 19), (20, 47), (3, 2))


def run(batch: Batch) -> None:
    check(batch, *batch.call("triton"))


@pytest.mark.parametrize("lens", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": False},
        {"window": (9, 0)},
        {"window": (5, 3), "causal": False},
        {"softcap": 2.0, "query_scale": 4.0},
        {"scale": -0.3},
        {"scale": 0.0},
        {"has_sinks": True},
        {"has_alibi": True},
        {"has_tree_mask": True},
        {"has_packed_query": True, "has_wide_tables": True, "out": "strided"},
    ],
    ids=lambda more: "-".join(f"{name}={value}" for name, value in more.items()) or "plain",
)
def test_every_feature_agrees_with_float64(lens: tuple[tuple[int, int], ...], more: dict[str, object]) -> None:
    run(Batch(lens=lens, group=2, head_dim=16, value_dim=16, block_size=3, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "more",
    [
        {"cache": "float"},
        {"cache": "fp8_e4m3", "fp8_scale": "head"},
        {"cache": "fp8_e5m2", "fp8_scale": "tensor"},
        {"cache": "fp8_e4m3", "layout": "hnd"},
        {"cache": "int8", "layout": "hnd"},
        {"cache": "int4", "int4_groups": (4, 2)},
        {"cache": "int4", "head_dim": 80, "value_dim": 40, "int4_groups": (5, 2)},
    ],
    ids=lambda more: "-".join(str(value) for value in more.values()),
)
def test_every_format_agrees_with_float64_in_every_dtype(dtype: str, more: dict[str, object]) -> None:
    sizes = {"head_dim": 32, "value_dim": 32, **more}
    run(Batch(lens=((1, 37), (9, 20)), group=2, num_kv_heads=2, dtype=dtype, **sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(80, 80), (96, 40), (112, 16), (192, 128), (10, 6)], ids=lambda dim: str(dim)
)
def test_heads_that_are_no_power_of_two_are_read_in_parts_or_padded(head_dim: int, value_dim: int) -> None:
    run(Batch(lens=MIXED, head_dim=head_dim, value_dim=value_dim, dtype="float16"))


@pytest.mark.parametrize("cache", ["float", "fp8_e4m3"])
def test_the_latent_of_mla_is_read_once_for_keys_and_values(cache: str) -> None:
    lens = ((1, 21), (2, 18))

    run(Batch(lens=lens, group=20, head_dim=576, value_dim=512, layout="latent", dtype="bfloat16", cache=cache))


@pytest.mark.parametrize("block_size", [1, 5, 16, 48, 256])
def test_tiles_of_keys_do_not_care_about_the_block_size(block_size: int) -> None:
    run(Batch(lens=((1, 50), (1, 16)), head_dim=16, value_dim=16, block_size=block_size))


@pytest.mark.parametrize("group", [3, 16, 17, 40])
def test_any_number_of_heads_shares_a_kv_head(group: int) -> None:
    run(Batch(lens=((1, 20), (3, 9)), group=group, head_dim=16, value_dim=16))


@pytest.mark.parametrize("more", [{}, {"has_sinks": True}, {"window": (20, 0)}, {"cache": "int8"}, {"causal": False}])
@pytest.mark.parametrize("has_decodes", [True, False], ids=["decodes", "prefills"])
def test_splits_merge_to_the_same(more: dict[str, object], has_decodes: bool) -> None:
    batch = Batch(lens=((1, 50), (7, 33), (1, 0)), group=2, head_dim=16, value_dim=24, **more)  # type: ignore[arg-type]

    with divided("triton", 1, 3, has_decodes):
        made = batch.plan("triton")
        check(batch, *batch.call("triton", plan=made))

    assert made.counts.num_merges > 0


def test_a_plan_of_fixed_size_gives_the_same_and_touches_nothing_else() -> None:
    batch = Batch(lens=((1, 50), (1, 3), (20, 47)), group=2, head_dim=16, value_dim=16, out="given")
    tensors = batch.tensors()
    padded = plan(
        tensors["seq_lens"].numpy(),
        tensors["query_start_loc"].numpy(),
        num_q_heads=2,
        num_kv_heads=1,
        backend="triton",
        fixed_size=True,
    )

    out, lse = batch.call("triton", plan=padded)

    exact = batch.plan("triton")
    assert padded.counts.num_decode_tasks > exact.counts.num_decode_tasks
    assert padded.counts.num_merges > exact.counts.num_merges > 0
    wanted, wanted_lse = batch.call("triton", plan=exact)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_caches_of_more_than_two_billion_elements_are_addressed_in_64_bits() -> None:
    # 2^31 elements and a little, of which only two blocks are ever touched: the rest is address space.
    block_size, dim, num_blocks = 16, 128, 2**20 + 2
    room = torch.empty(num_blocks * block_size * dim, dtype=torch.float16)
    cache = room.view(num_blocks, block_size, 1, dim)
    generator = torch.Generator().manual_seed(0)
    ids = [num_blocks - 1, num_blocks - 2]
    small = torch.randn(2, block_size, 1, dim, generator=generator).half()
    cache[ids[0]], cache[ids[1]] = small[0], small[1]
    query = torch.randn(1, 2, dim, generator=generator).half()

    def attend(keys: Tensor, table: list[int]) -> Tensor:
        tables, lens = torch.tensor([table], dtype=torch.int32), torch.tensor([30], dtype=torch.int32)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        out = paged_attention(query, keys, keys, tables, lens, starts, backend="triton")
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(attend(cache, ids), attend(small, [0, 1]))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cache": "fp8_e4m3"},
        {"cache": "int8"},
        {"cache": "int4"},
        {"layout": "latent", "head_dim": 80, "value_dim": 64},
    ],
    ids=lambda more: "-".join(str(value) for value in more.values()) or "plain",
)
def test_nan_in_a_draft_that_no_query_sees_stays_there(more: dict[str, object]) -> None:
    batch = Batch(lens=((3, 20),), block_size=20, **more)  # type: ignore[arg-type]
    # Nobody sees the second of three query tokens, which lies in slot 18.
    sees = torch.tensor([[True, False, False], [True, False, False], [True, False, True]])
    clean = {**batch.tensors(), "tree_mask": pack_tree_mask(sees)}
    spoilt = {name: tensor.clone() for name, tensor in clean.items()}
    if more.get("layout") == "latent":
        spoilt["value_cache"] = spoilt["key_cache"][..., :64]
    for name in ("k_scale", "v_scale") if "k_scale" in clean else ("key_cache", "value_cache"):
        unseen = spoilt[name][:, 18]
        poison = torch.full(unseen.shape, torch.nan).to(unseen.dtype)
        unseen.view(torch.uint8).copy_(poison.view(torch.uint8))

    wanted = paged_attention(**clean, backend="triton")  # type: ignore[arg-type]
    found = paged_attention(**spoilt, backend="triton")  # type: ignore[arg-type]

    assert isinstance(wanted, Tensor)
    assert not wanted.isnan().any()
    assert torch.equal(found, wanted)  # type: ignore[arg-type]


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers with 2^30 elements from one to the next along `dim`, 2^31 to the third: mostly address space."""
    strides = list(tensor.stride())
    strides[dim] = 2**30
    room = torch.empty(2**30 * (tensor.shape[dim] - 1) + tensor.numel(), dtype=tensor.dtype)
    return room.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("cache", ["float", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("name", ["slots", "heads"])
def test_slots_and_heads_are_addressed_in_64_bits(name: str, cache: str) -> None:
    batch = Batch(
        lens=((1, 6),), dtype="float16", cache=cache, fp8_scale="head", block_size=3, num_kv_heads=3, head_dim=16,
        value_dim=16,
    )  # fmt: skip
    near = batch.tensors()
    wanted, _ = batch.call("triton")

    far, out = dict(near), torch.empty_like(near["query"])
    for key in ("key_cache", "value_cache", "k_scale", "v_scale"):
        if key in near and (name == "heads" or near[key].ndim > 1):
            far[key] = far_apart(near[key].contiguous(), {"slots": 1, "heads": 2}[name] if near[key].ndim > 1 else 0)
    if name == "heads":
        far["query"], out = far_apart(near["query"].contiguous(), 1), far_apart(out, 1)
    paged_attention(**far, out=out, backend="triton")  # type: ignore[arg-type]

    assert torch.equal(out, wanted)


def test_the_interpreter_is_chosen_by_name_only() -> None:
    names = [info.name for info in backend_info()]

    assert pick_for_device(torch.device("cpu")).name != "triton"
    assert names[-2:] == ["triton", "reference"]


def test_a_partition_fills_its_tiles() -> None:
    for num_q_heads, num_kv_heads in ((32, 8), (8, 8), (12, 4), (128, 1)):
        partition = backend_named("triton").partition(num_q_heads, num_kv_heads, torch.device("cpu"))
        assert partition.max_decode_rows >= num_q_heads // num_kv_heads
        assert partition.query_tile >= 1


def test_a_batch_without_tokens_is_served() -> None:
    batch = Batch(lens=((0, 5), (0, 0)), head_dim=16, value_dim=16)

    out, lse = batch.call("triton")

    assert out.shape == (0, 1, 16)
    assert lse.shape == (0, 1)
    made = plan(np.array([5], np.int32), np.array([0, 0], np.int32), num_q_heads=1, num_kv_heads=1, backend="triton")
    assert made.counts == PlanCounts(0, 0, 0, 0)
