"""Random numbers that depend on a sample's seed and the position of the token, and on nothing else.

There is no state to advance, so a token does not depend on what else was in the batch, on whether its sample was
preempted and computed again, or on how many tokens were speculated.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int64s, as_int

__all__ = ["UInt64s", "seed_for", "stream_key", "uniforms"]

UInt64s: TypeAlias = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MAX_SEED = 2**64 - 1
SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_11 = (np.uint64(bits) for bits in (30, 27, 31, 11))
FACTOR_1, FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def seed_for(base_seed: int, sample_idx: int) -> int:
    """Seed of one of the samples that share a request's seed, 0..2^64-1; they differ for any two samples.

    >>> seed_for(7, 0) == seed_for(7, 1)
    False
    """
    as_int("base_seed", base_seed, at_least=0, at_most=MAX_SEED)
    as_int("sample_idx", sample_idx, at_least=0, at_most=2**32)
    return int(_mix(_mix(_as_uint64s(base_seed)) ^ _as_uint64s(sample_idx))[0])


def stream_key(seed: int) -> np.uint64:
    """Key of the row of random numbers that belongs to a seed. Close seeds have nothing in common."""
    return np.uint64(_mix(_as_uint64s(as_int("seed", seed, at_least=0, at_most=MAX_SEED)))[0])


def uniforms(keys: UInt64s, positions: Int64s) -> NDArray[np.float64]:
    """(n,) float64 in [0, 1), multiples of 2^-53: number `positions[i]` of stream `keys[i]`. O(n).

    This is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), entered at any place:
    its k-th number is a hash of key + k · golden ratio.
    """
    bits = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits >> SHIFT_11).astype(np.float64) * 2.0**-53


def _mix(values: UInt64s) -> UInt64s:
    """Scatter 64 bits over 64 bits, one to one (the finaliser of SplitMix64), wrapping around."""
    values = (values ^ (values >> SHIFT_30)) * FACTOR_1
    values = (values ^ (values >> SHIFT_27)) * FACTOR_2
    return values ^ (values >> SHIFT_31)


def _as_uint64s(value: int) -> UInt64s:
    return np.array([value], np.uint64)  # An array: numpy warns where a single number wraps around.
