"""What quantised caches store, and what `write_kv` writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pagedkv.attention import AttentionArgumentError, CacheFormat, format_of, scale_shape, write_kv
from pagedkv.attention.formats import dequantize, int4_groups, quantize

BACKENDS = ("reference", "torch")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_dtype_says_the_format() -> None:
    assert format_of(torch.bfloat16) is CacheFormat.FLOAT
    assert format_of(torch.float8_e4m3fn) is CacheFormat.FP8_E4M3
    assert format_of(torch.float8_e5m2) is CacheFormat.FP8_E5M2
    assert format_of(torch.int8) is CacheFormat.INT8
    assert format_of(torch.uint8) is CacheFormat.INT4
    assert format_of(torch.int32) is None


def test_scales_have_the_shape_that_the_format_needs() -> None:
    assert scale_shape(CacheFormat.FLOAT, 5, 16, 2, 64) is None
    assert scale_shape(CacheFormat.FP8_E5M2, 5, 16, 2, 64) == (2,)
    assert scale_shape(CacheFormat.INT8, 5, 16, 2, 64) == (5, 16, 2)
    assert scale_shape(CacheFormat.INT4, 5, 16, 2, 64) == (5, 16, 2, 2, 2)


def test_groups_are_of_32_channels_or_16_or_all() -> None:
    assert [int4_groups(dim) for dim in (32, 64, 48, 112, 8, 20)] == [1, 2, 3, 7, 1, 1]


def test_floats_stay_what_they_are() -> None:
    values = random(3, 2, 8).bfloat16()

    codes, scales = quantize(values, torch.bfloat16, None)

    assert scales is None
    assert torch.equal(dequantize(codes, None, torch.bfloat16), values)


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(FP8[0], 3), (FP8[1], 2)])
def test_fp8_is_off_by_half_of_its_last_bit_at_most(dtype: torch.dtype, mantissa_bits: int) -> None:
    values = random(50, 2, 8).clamp(0.05)

    codes, scales = quantize(values, dtype, None)

    assert scales is None
    error = (dequantize(codes, None, torch.float32) / values - 1).abs()
    assert error.max() <= 2.0 ** -(mantissa_bits + 1)


@pytest.mark.parametrize(("dtype", "largest"), [(FP8[0], 448.0), (FP8[1], 57344.0)])
def test_fp8_saturates_and_never_overflows(dtype: torch.dtype, largest: float) -> None:
    codes, _ = quantize(torch.tensor([[[1e9, -1e9, 0.0, largest]]]), dtype, None)

    assert codes.float().tolist() == [[[largest, -largest, 0.0, largest]]]


def test_an_fp8_scale_that_is_too_small_saturates() -> None:
    scale = torch.tensor(0.5)

    codes, _ = quantize(torch.tensor([[[1000.0, 104.0]]]), FP8[0], scale)

    assert codes.float().tolist() == [[[448.0, 208.0]]]
    assert dequantize(codes, scale, torch.float32).tolist() == [[[224.0, 104.0]]]


def test_an_fp8_scale_may_be_one_per_head() -> None:
    scale = torch.tensor([2.0, 0.25])

    codes, _ = quantize(torch.tensor([[[8.0], [8.0]]]), FP8[1], scale)

    assert codes.float().tolist() == [[[4.0], [32.0]]]
    assert dequantize(codes, scale, torch.float32).tolist() == [[[8.0], [8.0]]]


def test_int8_takes_the_largest_number_for_127() -> None:
    codes, scales = quantize(torch.tensor([[[1.27, -1.27, 0.635, 0.0], [-2.54, 0.0, 0.0, 0.02]]]), torch.int8, None)

    assert codes.tolist() == [[[127, -127, 64, 0], [-127, 0, 0, 1]]]
    assert scales is not None
    torch.testing.assert_close(scales, torch.tensor([[0.01, 0.02]]))


def test_int8_is_off_by_half_a_step_at_most() -> None:
    values = random(50, 2, 64)

    codes, scales = quantize(values, torch.int8, None)

    assert scales is not None
    error = (dequantize(codes, scales, torch.float64) - values).abs()
    assert (error <= scales[..., None] * 0.5000001).all()


def test_zeros_stay_zeros_in_every_format() -> None:
    zeros = torch.zeros(2, 1, 32)

    for dtype in (*FP8, torch.int8, torch.uint8):
        codes, scales = quantize(zeros, dtype, None)
        assert not dequantize(codes, scales, torch.float32).any()


def test_int4_puts_the_even_channel_in_the_low_half_of_the_byte() -> None:
    # From 0 to 15 the step is 1 and the minimum 0: the codes are the numbers.
    codes, scales = quantize(torch.tensor([[[0.0, 15.0, 3.0, 10.0]]]), torch.uint8, None)

    assert codes.tolist() == [[[0xF0, 0xA3]]]
    assert scales is not None
    assert scales.tolist() == [[[[1.0, 0.0]]]]
    assert dequantize(codes, scales, torch.float32).tolist() == [[[0.0, 15.0, 3.0, 10.0]]]


def test_int4_keeps_a_step_and_a_minimum_per_group() -> None:
    values = torch.tensor([[[0.0, 15.0, -30.0, 0.0]]])
    two_groups = torch.empty(1, 1, 2, 2)

    codes, scales = quantize(values, torch.uint8, two_groups)

    assert codes.tolist() == [[[0xF0, 0xF0]]]
    assert scales is not None
    assert scales.tolist() == [[[[1.0, 0.0], [2.0, -30.0]]]]


def test_a_group_of_equal_numbers_is_kept_to_bfloat16() -> None:
    codes, scales = quantize(torch.full((1, 1, 4), 0.3), torch.uint8, None)

    assert dequantize(codes, scales, torch.float32).tolist() == [[[float(torch.tensor(0.3).bfloat16())] * 4]]


def test_int4_is_off_by_little_more_than_half_a_step() -> None:
    values = random(50, 2, 64)

    codes, scales = quantize(values, torch.uint8, None)

    assert scales is not None
    assert scales.shape == (50, 2, 2, 2)
    steps = scales[..., 0].float().repeat_interleave(32, -1)
    magnitude = values.abs().amax(-1, keepdim=True)
    error = (dequantize(codes, scales, torch.float64) - values).abs()
    # The step and the minimum are rounded to 8 bits: the ends of a group may lie outside of what codes reach.
    assert (error <= 0.5 * steps + 15 * steps * 2**-8 + magnitude * 2**-8).all()


def test_no_tokens_are_quantised_to_no_codes() -> None:
    codes, scales = quantize(torch.zeros(0, 2, 64), torch.uint8, None)

    assert codes.shape == (0, 2, 32)
    assert dequantize(codes, scales, torch.float32).shape == (0, 2, 64)


def caches_of(dtype: torch.dtype, *, hnd: bool = False) -> tuple[Tensor, Tensor]:
    stored = 16 if dtype == torch.uint8 else 32
    shape = (3, 2, 4, stored) if hnd else (3, 4, 2, stored)
    key_cache, value_cache = (torch.zeros(shape).to(dtype) for _ in range(2))
    return (key_cache.transpose(1, 2), value_cache.transpose(1, 2)) if hnd else (key_cache, value_cache)


def scales_of(dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if dtype == torch.int8:
        return torch.full((3, 4, 2), -1.0), torch.full((3, 4, 2), -1.0)
    if dtype == torch.uint8:
        return tuple(torch.full((3, 4, 2, 1, 2), -1.0, dtype=torch.bfloat16) for _ in range(2))
    return (torch.tensor(0.5), torch.tensor([0.25, 2.0])) if dtype in FP8 else (None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hnd", [False, True], ids=["nhd", "hnd"])
@pytest.mark.parametrize("dtype", [torch.float32, *FP8, torch.int8, torch.uint8], ids=str)
def test_a_write_stores_what_was_quantised_and_touches_nothing_else(
    dtype: torch.dtype, hnd: bool, backend: str
) -> None:
    (key_cache, value_cache), (k_scale, v_scale) = caches_of(dtype, hnd=hnd), scales_of(dtype)
    key, value = random(3, 2, 32), random(3, 2, 32) + 1
    slots = torch.tensor([9, -1, 2])

    write_kv(key, value, key_cache, value_cache, slots, k_scale=k_scale, v_scale=v_scale, backend=backend)

    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        codes, scales = quantize(new, dtype, scale)
        stored = cache.contiguous().view(torch.uint8).flatten(0, 1)
        wanted = codes.contiguous().view(torch.uint8)
        assert torch.equal(stored[[9, 2]], wanted[[0, 2]])
        others = [slot for slot in range(12) if slot not in (9, 2)]
        assert not stored[others].any()
        if scales is not None and scale is not None:
            assert torch.equal(scale.flatten(0, 1)[[9, 2]], scales[[0, 2]])
            assert (scale.flatten(0, 1)[others] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_latent_cache_is_written_alone(backend: str) -> None:
    cache = torch.zeros(2, 4, 1, 6)

    write_kv(torch.ones(1, 1, 6), None, cache, None, torch.tensor([5]), backend=backend)

    assert cache.flatten(0, 1)[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("slots", [[12, 0], [0, -2]])
def test_slots_out_of_range_raise_before_anything_is_written(slots: list[int]) -> None:
    key_cache, value_cache = caches_of(torch.float32)

    with pytest.raises(AttentionArgumentError, match=r"slot_mapping must be in -1\.\.11, found"):
        write_kv(random(2, 2, 32), random(2, 2, 32), key_cache, value_cache, torch.tensor(slots))

    assert not key_cache.any()
    assert not value_cache.any()


def test_a_write_of_no_tokens_does_nothing() -> None:
    key_cache, value_cache = caches_of(torch.float32)

    write_kv(random(0, 2, 32), random(0, 2, 32), key_cache, value_cache, torch.zeros(0, dtype=torch.int64))

    assert not key_cache.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_steps_are_quotients_on_every_device(dtype: torch.dtype) -> None:
    # On CUDA, torch divides by a number through its reciprocal, which kernels do not: only tensors may divide.
    divisors = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.div.Tensor:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    values = random(3, 2, 32)
    with Recorded():
        quantize(values, dtype, None)

    assert len(divisors) == 2
    assert all(isinstance(divisor, Tensor) for divisor in divisors)
