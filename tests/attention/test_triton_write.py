"""The Triton write kernel in Triton's interpreter: to the bit what the reference writes."""

from __future__ import annotations

import pytest
import torch
from writes import Write

from pagedkv.attention import write_kv
from pagedkv.attention.triton_kernels import is_interpreted

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not is_interpreted(), reason="Triton compiles here: benchmarks/gpu_check.py checks that"
)


def check_write(write: Write) -> None:
    got, wanted = write.run("triton"), write.run("reference")
    for name, tensor in wanted.items():
        if tensor is not None:
            other = got[name]
            assert other is not None
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"layout": "hnd", "has_packed_input": True},
        {"layout": "padded", "block_size": 5, "value_dim": 40},
        {"has_value": False},
        {"cache": "fp8_e4m3", "magnitude": 300.0},
        {"cache": "fp8_e5m2", "fp8_scale": "head"},
        {"cache": "fp8_e4m3", "fp8_scale": "tensor", "value_dim": 80},
        {"cache": "int8", "value_dim": 40},
        {"cache": "int8", "magnitude": 0.0},
        {"cache": "int4", "int4_groups": (2, 4)},
        {"cache": "int4", "head_dim": 80, "value_dim": 40, "int4_groups": (5, 2), "magnitude": 300.0},
    ],
    ids=lambda more: "-".join(str(value) for value in more.values()) or "plain",
)
def test_a_write_stores_what_the_reference_stores(dtype: str, more: dict[str, object]) -> None:
    check_write(Write(num_tokens=23, num_skipped=4, num_kv_heads=2, dtype=dtype, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_nan_among_the_channels_makes_the_scale_nan(cache: str, backend: str) -> None:
    write = Write(num_tokens=3, cache=cache, int4_groups=(2, 2))
    tensors = write.tensors()
    for name in ("key", "value"):
        tensors[name][1, 0, [5, 40]] = torch.nan  # type: ignore[index]

    write_kv(**tensors, backend=backend)  # type: ignore[arg-type]

    for name in ("k_scale", "v_scale"):
        scale = tensors[name].flatten(0, 1)[tensors["slot_mapping"]]  # type: ignore[union-attr]
        assert scale[1].isnan().all()
        assert not scale[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_rounded_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    # Every number of the format, every midpoint between two of them, their neighbours, and what is out of range.
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = codes[codes.isfinite()].sort().values
    midpoints = (finite[1:] + finite[:-1]) / 2
    beyond = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan, 1e-30])
    numbers = torch.cat((finite, midpoints, torch.nextafter(midpoints, midpoints + 1), beyond))
    numbers = torch.cat((numbers, numbers.new_zeros(-len(numbers) % 64))).view(-1, 1, 64)
    caches = [torch.zeros(len(numbers), 1, 1, 64, dtype=dtype) for _ in range(2)]

    for cache, backend in zip(caches, ("triton", "reference"), strict=True):
        write_kv(numbers, None, cache, None, torch.arange(len(numbers)), backend=backend)

    got, wanted = (cache.float() for cache in caches)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_slots_of_more_than_two_billion_elements_are_written() -> None:
    num_blocks, dim = 2**20 + 2, 128
    cache = torch.empty(num_blocks * 16 * dim, dtype=torch.float16).view(num_blocks, 16, 1, dim)
    new = torch.randn(2, 1, dim, generator=torch.Generator().manual_seed(0)).half()
    slots = torch.tensor([num_blocks * 16 - 1, num_blocks * 16 - 20])

    write_kv(new, None, cache, None, slots, backend="triton")

    assert torch.equal(cache.view(-1, dim)[slots], new[:, 0])
