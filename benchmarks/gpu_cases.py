"""Steps of attention to time on a GPU: small descriptions, and the tensors they build."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import CacheFormat, paged_attention, plan, scale_shape, write_kv

__all__ = ["Call", "Case", "Pool", "brief", "random_numbers", "rotations", "warm"]

CACHE_DTYPES = {
    "float": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int4": torch.uint8,
}
# Calls of one measurement together read this much, several times the L2.
ROTATED_BYTES = 2**28
MAX_ROTATIONS = 24
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One step. lens: how many sequences of (query tokens, length); dims: of keys and values; bfloat16 queries."""

    name: str
    lens: tuple[tuple[int, int, int], ...]
    cache: str = "float"
    heads: tuple[int, int] = (32, 8)
    dims: tuple[int, int] = (128, 128)
    block_size: int = 16
    layout: Literal["NHD", "HND"] = "HND"
    is_latent: bool = False
    is_scattered: bool = True
    is_write: bool = False

    @property
    def pool_kind(self) -> tuple[Any, ...]:
        """What cases have in common that can take their blocks from one pool."""
        return self.cache, self.heads, self.dims, self.block_size, self.layout, self.is_latent

    @property
    def seqs(self) -> list[tuple[int, int]]:
        """(query tokens, length) of every sequence."""
        return [(queries, length) for count, queries, length in self.lens for _ in range(count)]

    @property
    def num_blocks(self) -> int:
        """Blocks that hold all sequences."""
        return sum(-(-length // self.block_size) for _, length in self.seqs)

    @property
    def num_bytes(self) -> float:
        """Bytes of keys and values, and their scales, that have to be read."""
        per_element = 0.5 if self.cache == "int4" else CACHE_DTYPES[self.cache].itemsize
        dims = self.dims[:1] if self.is_latent else self.dims
        scale_bytes = {"int8": 4.0 * len(dims), "int4": sum(dims) / 32 * 4}.get(self.cache, 0.0)
        tokens = sum(queries if self.is_write else length for queries, length in self.seqs)
        return tokens * self.heads[1] * (sum(dims) * per_element + scale_bytes)

    @property
    def num_flops(self) -> float:
        """Operations of both products over the keys that are seen, causally."""
        seen = sum(queries * (length - queries) + queries * (queries + 1) / 2 for queries, length in self.seqs)
        return 2.0 * seen * self.heads[0] * sum(self.dims)

    def shrunk(self) -> Case:
        """The same kernels in little time: short sequences, few of them, some split."""
        lens = tuple((1, min(queries, 256), min(length, 1024)) for _, queries, length in self.lens)
        return dataclasses.replace(self, lens=lens)


def rotations(case: Case) -> int:
    """How many calls have to read different memory, so that none finds it in the L2."""
    return min(math.ceil(ROTATED_BYTES / case.num_bytes), MAX_ROTATIONS)


class Pool:
    """A cache of random numbers that cases of one shape take their blocks from."""

    def __init__(self, case: Case, num_blocks: int) -> None:
        packing = 2 if case.cache == "int4" else 1
        shape = (num_blocks, case.block_size, case.heads[1])
        # Of strides in the order of the layout, (num_blocks, block_size, kv_heads, dim) whichever it is.
        in_order = shape if case.layout == "NHD" else (num_blocks, case.heads[1], case.block_size)
        caches = [
            in_layout(random_numbers((*in_order, dim // packing), CACHE_DTYPES[case.cache]), case.layout)
            for dim in (case.dims[:1] if case.is_latent else case.dims)
        ]
        self.keys, self.values = caches[0], caches[-1][..., : case.dims[1] // packing]
        self.scales = [_scale(CacheFormat(case.cache), shape, dim) for dim in case.dims]
        if case.is_latent:
            self.scales[1] = self.scales[0]

    def calls(self, case: Case) -> list[Call]:
        """Calls of the op, or of the write, each over other blocks."""
        num_calls = max(min(rotations(case), len(self.keys) // case.num_blocks), 1)
        rng = np.random.default_rng(0)
        all_ids = rng.permutation(len(self.keys)) if case.is_scattered else np.arange(len(self.keys))
        parts = [all_ids[i * case.num_blocks : (i + 1) * case.num_blocks] for i in range(num_calls)]
        return [self._write(case, ids) if case.is_write else self._attend(case, ids) for ids in parts]

    def flashinfer_calls(self, case: Case) -> list[Call] | None:
        """Calls of FlashInfer over the very same blocks; None where it is not installed, or has no counterpart."""
        if case.cache != "float" or case.is_latent or case.is_write or importlib.util.find_spec("flashinfer") is None:
            return None
        import flashinfer

        query_lens, lengths = np.array(case.seqs, np.int32).T
        used = -(-lengths // case.block_size)
        # It takes the host's arrays, as tensors of int32.
        ends = [torch.from_numpy(np.concatenate(([0], n.cumsum())).astype(np.int32)) for n in (query_lens, used)]
        last = torch.from_numpy((lengths - (used - 1) * case.block_size).astype(np.int32))
        ids = np.random.default_rng(0).permutation(len(self.keys))[: case.num_blocks].astype(np.int32)
        pages = torch.from_numpy(ids).cuda()
        room = torch.empty(2**27, dtype=torch.uint8, device="cuda")
        query = torch.randn(int(query_lens.sum()), case.heads[0], case.dims[0], device="cuda").bfloat16()
        sizes = (*case.heads, case.dims[0], case.block_size)
        if max(query_lens) == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, case.layout, use_tensor_cores=True)
            wrapper.plan(ends[1], pages, last, *sizes, q_data_type=query.dtype, kv_data_type=self.keys.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, case.layout)
            wrapper.plan(*ends, pages, last, *sizes, causal=True, q_data_type=query.dtype, kv_data_type=self.keys.dtype)
        caches = (in_layout(self.keys, case.layout), in_layout(self.values, case.layout))
        return [lambda: wrapper.run(query, caches)]

    def _attend(self, case: Case, ids: np.ndarray) -> Call:
        query_lens, lengths = np.array(case.seqs, np.int32).T
        starts = np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
        tables = np.zeros((len(lengths), -(-int(lengths.max()) // case.block_size)), np.int32)
        first = 0
        for row, length in zip(tables, lengths, strict=True):
            used = -(-int(length) // case.block_size)
            row[:used] = ids[first : first + used]
            first += used
        made = plan(
            np.ascontiguousarray(lengths),
            starts,
            num_q_heads=case.heads[0],
            num_kv_heads=case.heads[1],
            device="cuda",
            backend="triton",
        )
        query = torch.randn(int(starts[-1]), case.heads[0], case.dims[0], device="cuda").bfloat16()
        arguments: dict[str, Any] = {
            "query": query,
            "key_cache": self.keys,
            "value_cache": self.values,
            "block_tables": torch.from_numpy(tables).cuda(),
            "seq_lens": torch.from_numpy(np.ascontiguousarray(lengths)).cuda(),
            "query_start_loc": torch.from_numpy(starts).cuda(),
            "k_scale": self.scales[0],
            "v_scale": self.scales[1],
            "plan": made,
            "out": torch.empty(*query.shape[:2], case.dims[1], dtype=query.dtype, device="cuda"),
        }
        return lambda: paged_attention(**arguments)

    def _write(self, case: Case, ids: np.ndarray) -> Call:
        num_tokens = sum(queries for queries, _ in case.seqs)
        slots = (
            torch.from_numpy(ids[:, None] * case.block_size + np.arange(case.block_size)).flatten().cuda()[:num_tokens]
        )
        key, value = (torch.randn(num_tokens, case.heads[1], dim, device="cuda").bfloat16() for dim in case.dims)
        arguments = (key, value, self.keys, self.values, slots)
        scales = {"k_scale": self.scales[0], "v_scale": self.scales[1]}
        return lambda: write_kv(*arguments, **scales, check_slots=False, backend="triton")


def warm(case: Case) -> str | None:
    """Compile what a case needs, into the cache on disk; why it does not run, None if it does. For worker processes."""
    small = case.shrunk()
    try:
        for call in Pool(small, small.num_blocks).calls(small):
            call()
        torch.cuda.synchronize()
    # Whatever it is, a kernel that does not compile among it: it costs the row of this case, not the run.
    except Exception as error:  # noqa: BLE001
        return brief(error)
    return None


def brief(error: Exception) -> str:
    """Its type and the first line of its message, in plain text: not every error can be sent from process to process."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers around 0; of a coded dtype codes that are no NaN. Filled in pieces, for float32 takes room."""
    tensor = torch.empty(shape, dtype=dtype, device="cuda")
    flat = tensor.view(-1)
    if not dtype.is_floating_point:
        bounds = torch.iinfo(dtype)
        return tensor.random_(bounds.min, bounds.max)
    for piece in flat.split(2**28):
        piece.copy_(torch.randn(len(piece), device="cuda"))
    return tensor


def in_layout(cache: Tensor, layout: str) -> Tensor:
    """A cache in the order of its layout as the op takes it, and the other way round: a view."""
    return cache if layout == "NHD" else cache.transpose(1, 2)


def _scale(cache_format: CacheFormat, shape: tuple[int, int, int], dim: int) -> Tensor | None:
    sizes = scale_shape(cache_format, *shape, dim)
    if sizes is None:
        return None
    scale = torch.rand(sizes, device="cuda") / 64
    return scale.bfloat16() if cache_format is CacheFormat.INT4 else scale
