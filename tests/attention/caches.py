"""What batches and writes have in common: the formats and layouts of caches, numbers for them, and how they are told."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

__all__ = ["CACHE_DTYPES", "DTYPES", "FORMATS", "FP8", "LAYOUTS", "Described", "empty_caches", "normal"]

FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
CACHE_DTYPES = {**FP8, "int8": torch.int8, "int4": torch.uint8}
FORMATS = ("float", "int8", "fp8_e4m3", "fp8_e5m2", "int4")
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("nhd", "hnd", "joint", "joint_hnd", "side_by_side", "padded", "latent")


class Described:
    """A dataclass whose repr names only what differs from the defaults, and is the code that makes it again."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def empty_caches(
    layout: str, shape: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Caches of keys and values, (blocks, block_size, kv_heads, dim) each, as an engine may lay them.

    nhd, hnd:         each by itself, tokens or heads outside
    joint, joint_hnd: one tensor [blocks, 2, ...]
    side_by_side:     one tensor, a token's key and value of a head after one another
    padded:           each by itself, rows with three elements between them and at odd addresses
    latent:           values are the first channels of the keys
    """
    num_blocks, block_size, heads = shape
    key_dim, value_dim = dims
    if layout == "latent":
        keys = _blank((num_blocks, block_size, heads, key_dim), dtype, device)
        return keys, keys[..., :value_dim]
    if layout == "joint":
        both = _blank((num_blocks, 2, block_size, heads, key_dim), dtype, device)
        return both[:, 0], both[:, 1]
    if layout == "joint_hnd":
        both = _blank((num_blocks, 2, heads, block_size, key_dim), dtype, device).transpose(2, 3)
        return both[:, 0], both[:, 1]
    if layout == "side_by_side":
        both = _blank((num_blocks, heads, block_size, key_dim + value_dim), dtype, device).transpose(1, 2)
        return both[..., :key_dim], both[..., key_dim:]
    caches = []
    for dim in dims:
        if layout == "padded":
            caches.append(_blank((num_blocks, block_size, heads, dim + 3), dtype, device)[..., 1 : dim + 1])
        elif layout == "hnd":
            caches.append(_blank((num_blocks, heads, block_size, dim), dtype, device).transpose(1, 2))
        else:
            caches.append(_blank((num_blocks, block_size, heads, dim), dtype, device))
    return caches[0], caches[1]


def _blank(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
