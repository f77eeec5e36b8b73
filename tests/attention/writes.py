"""Random writes into caches that are full of old data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from caches import CACHE_DTYPES, DTYPES, FORMATS, FP8, LAYOUTS, Described, empty_caches, normal
from random_batches import BLOCK_SIZES, GROUP_COUNTS, HEAD_DIMS, fitting_groups
from torch import Tensor

from pagedkv.attention import write_kv

__all__ = ["Write", "random_write"]


@dataclass(frozen=True, repr=False)
class Write(Described):
    """What to write, in plain numbers. The caches are full of old data, which must survive beside the new.

    num_skipped: of the tokens, how many have slot -1
    has_value:   whether there is a cache of values beside that of keys
    magnitude:   of the new numbers; fp8 saturates on large ones
    """

    num_tokens: int
    num_skipped: int = 0
    seed: int = 0
    dtype: str = "float32"
    cache: str = "float"
    fp8_scale: str = "none"
    int4_groups: tuple[int, int] = (1, 1)
    num_blocks: int = 4
    block_size: int = 16
    num_kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    layout: str = "nhd"
    has_value: bool = True
    has_packed_input: bool = False
    magnitude: float = 1.0

    def tensors(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """New tensors at every call: they are written to."""
        rng = np.random.default_rng(self.seed)
        dtype: torch.dtype = getattr(torch, self.dtype)
        shape = (self.num_blocks, self.block_size, self.num_kv_heads)
        packing = 2 if self.cache == "int4" else 1
        dims = (self.head_dim // packing, self.value_dim // packing)
        caches = empty_caches(self.layout, shape, dims, CACHE_DTYPES.get(self.cache, dtype), device)
        for cache in caches:
            size = (*cache.shape[:-1], cache.shape[-1] * cache.element_size())
            cache.view(torch.uint8).copy_(torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)))
        slots = np.full(self.num_tokens, -1, np.int64)
        written = rng.permutation(self.num_tokens)[self.num_skipped :]
        slots[written] = rng.permutation(self.num_blocks * self.block_size)[: len(written)]
        tensors: dict[str, Tensor | None] = {"slot_mapping": torch.from_numpy(slots).to(device)}
        for idx, (name, dim) in enumerate((("key", self.head_dim), ("value", self.value_dim))):
            is_given = name == "key" or self.has_value
            num_heads = self.num_kv_heads * (2 if self.has_packed_input else 1)
            new = (normal(rng, (self.num_tokens, num_heads, dim)) * self.magnitude).to(dtype).to(device)
            tensors[name] = new[:, : self.num_kv_heads] if is_given else None
            tensors[f"{name}_cache"] = caches[idx] if is_given else None
            tensors[f"{name[0]}_scale"] = self._scale(shape, self.int4_groups[idx], rng, device) if is_given else None
        return tensors

    def _scale(self, shape: tuple[int, int, int], groups: int, rng: np.random.Generator, device: str) -> Tensor | None:
        if self.cache in FP8 and self.fp8_scale != "none":
            size = () if self.fp8_scale == "tensor" else (self.num_kv_heads,)
            return torch.from_numpy(np.asarray(rng.uniform(0.5, 2, size), np.float32)).to(device)
        if self.cache == "int8":
            return torch.full(shape, torch.nan, device=device)
        if self.cache == "int4":
            return torch.full((*shape, groups, 2), torch.nan, dtype=torch.bfloat16, device=device)
        return None

    def run(self, backend: str | None, device: str = "cpu") -> dict[str, Tensor | None]:
        """Write by `backend`; the tensors after it."""
        tensors = self.tensors(device)
        write_kv(**tensors, backend=backend)
        return tensors


def random_write(seed: int) -> Write:
    """Any write that `write_kv` takes, mostly small ones. The same seed gives the same write."""
    rng = np.random.default_rng(seed)

    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    cache, layout = one_of(*FORMATS), one_of(*(name for name in LAYOUTS if name != "latent"))
    head_dim, value_dim = one_of(*HEAD_DIMS), one_of(*HEAD_DIMS)
    if layout in ("joint", "joint_hnd") or rng.random() < 0.5:
        value_dim = head_dim
    num_blocks, block_size = int(rng.integers(1, 7)), one_of(*BLOCK_SIZES)
    num_tokens = int(rng.integers(min(num_blocks * block_size, 40) + 1))
    groups = (fitting_groups(one_of(*GROUP_COUNTS), head_dim), fitting_groups(one_of(*GROUP_COUNTS), value_dim))
    return Write(
        num_tokens=num_tokens,
        num_skipped=int(rng.integers(num_tokens + 1)) if rng.random() < 0.5 else 0,
        seed=seed,
        dtype=one_of(*DTYPES),
        cache=cache,
        fp8_scale=one_of("none", "tensor", "head") if cache in FP8 else "none",
        int4_groups=groups if cache == "int4" else (1, 1),
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=one_of(1, 2, 3),
        head_dim=head_dim,
        value_dim=value_dim,
        layout=layout,
        has_value=rng.random() < 0.8,
        has_packed_input=rng.random() < 0.5,
        magnitude=one_of(1.0, 1.0, 300.0, 0.0),
    )
