"""Conversions and products that Triton's compiler gets right and its interpreter does not, and the codes of fp8.

The interpreter (3.6 to 3.9) truncates float32 to bfloat16, multiplies the bit patterns of bfloat16 as whole numbers, and
rounds fp8 wrongly. Tests run there, so the few places that need it ask `INTERPRETED`; compiled code has none of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "decoded", "fp8_codes", "log2_of", "narrowed", "product", "rounded", "small_to_float", "tanh"]

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 `x` in `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def product(a, b, total):
    """The matrix product of `a` and `b`, added to `total`, in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def decoded(codes, FP8: tl.constexpr, dtype: tl.constexpr):
    """The numbers of one-byte codes in `dtype`: of uint8 that holds FP8, "e4m3" or "e5m2", or of int8 where FP8 is ""."""
    if FP8 == "e5m2":
        if INTERPRETED:
            return narrowed((codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32), dtype)
        else:
            return codes.to(tl.float8e5, bitcast=True).to(dtype)
    elif FP8 == "e4m3":
        if INTERPRETED:
            # Sign, exponent and mantissa where float16 has them; its exponents are 8 lower.
            bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
            return narrowed(bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0, dtype)
        else:
            return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        if codes.dtype == tl.int8:
            # From -128..127 to 0..255, and back in the sum.
            return narrowed(small_to_float(codes.to(tl.uint8, bitcast=True) ^ 0x80) - 128.0, dtype)
        else:
            return codes.to(dtype)


@triton.jit
def small_to_float(codes):
    """Whole numbers 0..255 in float32: put below 2^23 as its last bits. The conversion takes a quarter of that speed."""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def rounded(x):
    """Float32 `x`, |x| < 2^22, at the nearest whole number, ties to even: at 1.5 * 2^23 float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def fp8_codes(x, FP8: tl.constexpr):
    """The uint8 codes of float32 `x`, ties to even; what is too large becomes the largest finite number, NaN stays one.

    By bits: so it is the same on every GPU, and a conversion in hardware would not show in a kernel that waits for memory.
    """
    MANTISSA: tl.constexpr = 3 if FP8 == "e4m3" else 2
    BIAS: tl.constexpr = 7 if FP8 == "e4m3" else 15
    LARGEST: tl.constexpr = 448.0 if FP8 == "e4m3" else 57344.0
    SHIFT: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    # One unit of a subnormal code.
    UNITS: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    bits += (1 << (SHIFT - 1)) - 1 + ((bits >> SHIFT) & 1)
    normal = (bits >> SHIFT) - ((127 - BIAS) << MANTISSA)
    is_subnormal = size < SMALLEST_NORMAL
    subnormal = rounded(tl.where(is_subnormal, size, 0.0) * UNITS).to(tl.uint32)
    codes = tl.where(is_subnormal, subnormal, normal)
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return tl.where(x == x, codes | sign, 0x7F).to(tl.uint8)


@triton.jit
def tanh(x):
    """By exp2, and near 0, where that cancels, by the first six terms of the Taylor series: 3e-7 of the result."""
    square = x * x
    series = 62.0 / 2835.0 - square * (1382.0 / 155925.0)
    series = 2.0 / 15.0 - square * (17.0 / 315.0 - square * series)
    series = x - x * square * (1.0 / 3.0 - square * series)
    # exp2 may be infinite: the quotient is then 0.
    large = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.35, series, large)


@triton.jit
def log2_of(x):
    """The binary logarithm, -inf of 0 without a warning of the interpreter."""
    return tl.where(x > 0, tl.log2(tl.where(x > 0, x, 1.0)), -float("inf"))
