"""The batches that bench_attention.py times: tensors, and what a right answer is."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import CacheFormat, format_of, scale_shape, write_kv
from pagedkv.attention.formats import dequantize
from pagedkv.storage.host_memory import zero_bytes

# Copies of keys and values that are read in turn: well above most last-level caches (32 MB), though not above every server's.
ROTATED_BYTES = 256 << 20
MAX_COPIES = 64
NUM_CHECKED_ROWS = 24


@dataclass(frozen=True)
class Case:
    """A batch. lens: (query tokens, sequence length) of each sequence; cache: a dtype other than the query's, or None."""

    name: str
    lens: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    heads: tuple[int, int] = (32, 8)
    dims: tuple[int, int] = (128, 128)
    block_size: int = 16
    is_latent: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(num_queries for num_queries, _ in self.lens)

    @property
    def num_keys(self) -> int:
        return sum(length for _, length in self.lens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of all sequences, as floats."""
        channels = self.dims[0] if self.is_latent else sum(self.dims)
        return self.num_keys * self.heads[1] * channels * self.dtype.itemsize

    @property
    def num_copies(self) -> int:
        return min(max(math.ceil(ROTATED_BYTES / self.kv_bytes), 1), MAX_COPIES)

    @property
    def flops(self) -> int:
        """Two products, of the pairs of query and key that causal attention looks at and of no other."""
        pairs = sum(n * length - n * (n - 1) // 2 for n, length in self.lens)
        return 2 * pairs * self.heads[0] * sum(self.dims)


class Data:
    """Keys and values of a case in one piece per sequence, several copies; caches are filled from them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        (q_heads, kv_heads), (key_dim, value_dim) = case.heads, case.dims
        self.query = _numbers((case.num_tokens, q_heads, key_dim), case.dtype, 0)
        # Per copy and sequence: keys (1, kv_heads, length, key_dim) and values, as un-paged attention likes them best.
        # Sequences of one length lie in one tensor, so that one call can take them all.
        self.is_uniform = len(set(case.lens)) == 1
        self.copies: list[tuple[list[Tensor], list[Tensor]]] = []
        for copy_idx in range(case.num_copies):
            keys = self._of_sequences(kv_heads, key_dim, 2 * copy_idx)
            values = (
                [key[..., :value_dim] for key in keys]
                if case.is_latent
                else self._of_sequences(kv_heads, value_dim, 2 * copy_idx + 1)
            )
            self.copies.append((keys, values))
        self.seq_lens = np.array([length for _, length in case.lens], np.int32)
        self.starts = np.concatenate(([0], np.cumsum([n for n, _ in case.lens]))).astype(np.int32)

    def _of_sequences(self, num_heads: int, dim: int, seed: int) -> list[Tensor]:
        if self.is_uniform:
            shape = (len(self.case.lens), num_heads, self.case.lens[0][1], dim)
            return list(_numbers(shape, self.case.dtype, seed).split(1))
        return [
            _numbers((1, num_heads, length, dim), self.case.dtype, seed + 1000 * i)
            for i, (_, length) in enumerate(self.case.lens)
        ]

    def stacked(self, copy_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all sequences of a uniform case, (seqs, kv_heads, length, dim), without a copy."""
        keys, values = self.copies[copy_idx]
        size, stride = (len(keys), *keys[0].shape[1:]), keys[0].stride()
        return keys[0].as_strided(size, stride), values[0].as_strided(
            (*size[:-1], values[0].shape[-1]), values[0].stride()
        )

    def block_tables(self, block_size: int, *, is_scattered: bool) -> np.ndarray:
        """Each sequence's blocks, shuffled over the whole pool or one after another."""
        per_seq = [-(-length // block_size) for _, length in self.case.lens]
        ids = np.arange(sum(per_seq), dtype=np.int32)
        if is_scattered:
            np.random.default_rng(0).shuffle(ids)
        tables = np.zeros((len(per_seq), max(per_seq)), np.int32)
        taken = 0
        for row, num_blocks in zip(tables, per_seq, strict=True):
            row[:num_blocks] = ids[taken : taken + num_blocks]
            taken += num_blocks
        return tables

    def slots(self, tables: np.ndarray, block_size: int) -> list[Tensor]:
        """Of each sequence, where its tokens lie."""
        slots = []
        for row, (_, length) in zip(tables, self.case.lens, strict=True):
            positions = np.arange(length)
            slots.append(
                torch.from_numpy(row[positions // block_size].astype(np.int64) * block_size + positions % block_size)
            )
        return slots

    @functools.cached_property
    def checked_rows(self) -> list[int]:
        """Query tokens that results are checked at: the first and last of a batch, and some between."""
        last = self.case.num_tokens - 1
        return sorted({round(i * last / (NUM_CHECKED_ROWS - 1)) for i in range(NUM_CHECKED_ROWS)})

    def truth(self, keys_and_values: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        """The output at `checked_rows` in float64."""
        q_heads, kv_heads = self.case.heads
        outs = []
        for row in self.checked_rows:
            seq_idx = int(np.searchsorted(self.starts, row, side="right")) - 1
            num_queries, length = self.case.lens[seq_idx]
            end = length - num_queries + (row - int(self.starts[seq_idx])) + 1
            keys, values = (part[seq_idx][0, :, :end].double() for part in keys_and_values)
            query = self.query[row].double().view(kv_heads, q_heads // kv_heads, -1)
            weights = torch.softmax(query @ keys.transpose(1, 2) * self.case.dims[0] ** -0.5, -1)
            outs.append((weights @ values).flatten(0, 1))
        return torch.stack(outs)


@dataclass(frozen=True)
class Paged:
    """The caches of all copies, and where the sequences lie in them."""

    keys: list[Tensor]
    values: list[Tensor]
    k_scales: list[Tensor | None]
    v_scales: list[Tensor | None]
    tables: np.ndarray

    @classmethod
    def of(
        cls, data: Data, *, is_scattered: bool = True, is_hnd: bool = True, cache: torch.dtype | None = None
    ) -> Paged:
        """Caches with what `data` holds, as `KVStorage` lays them out by default; quantised if `cache` says so."""
        case = data.case
        tables = data.block_tables(case.block_size, is_scattered=is_scattered)
        slots = torch.cat(data.slots(tables, case.block_size))
        num_blocks = sum(-(-length // case.block_size) for _, length in case.lens)
        dtype = cache or case.cache or case.dtype
        paged = cls([], [], [], [], tables)
        for keys, values in data.copies:
            key_cache, k_scale = _empty(case, num_blocks, case.dims[0], dtype, is_hnd)
            new_keys = torch.cat([key[0].transpose(0, 1) for key in keys])
            if case.is_latent:
                write_kv(new_keys, None, key_cache, None, slots, k_scale=k_scale)
                value_cache, v_scale = key_cache[..., : case.dims[1]], k_scale
            else:
                value_cache, v_scale = _empty(case, num_blocks, case.dims[1], dtype, is_hnd)
                new_values = torch.cat([value[0].transpose(0, 1) for value in values])
                write_kv(new_keys, new_values, key_cache, value_cache, slots, k_scale=k_scale, v_scale=v_scale)
            paged.keys.append(key_cache)
            paged.values.append(value_cache)
            paged.k_scales.append(k_scale)
            paged.v_scales.append(v_scale)
        return paged

    @property
    def num_bytes(self) -> int:
        """What one call reads of keys, values and scales, each block counted once."""
        parts = (self.keys[0], self.values[0], self.k_scales[0], self.v_scales[0])
        if self.values[0].untyped_storage().data_ptr() == self.keys[0].untyped_storage().data_ptr():
            parts = parts[::2]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def numbers(self, data: Data) -> tuple[list[Tensor], list[Tensor]]:
        """What the first copy stands for, exactly, per sequence (1, kv_heads, length, dim) in float64."""
        slots = data.slots(self.tables, data.case.block_size)
        both = []
        for cache, scale in ((self.keys[0], self.k_scales[0]), (self.values[0], self.v_scales[0])):
            parts = []
            for where in slots:
                place = (where // data.case.block_size, where % data.case.block_size)
                per_token = scale[place] if scale is not None and scale.ndim >= 3 else scale
                parts.append(dequantize(cache[place], per_token, torch.float64).transpose(0, 1)[None])
            both.append(parts)
        return both[0], both[1]


def _empty(case: Case, num_blocks: int, dim: int, dtype: torch.dtype, is_hnd: bool) -> tuple[Tensor, Tensor | None]:
    """A cache, and the scales it needs."""
    cache_format = format_of(dtype)
    assert cache_format is not None
    stored = dim // 2 if cache_format is CacheFormat.INT4 else dim
    heads = case.heads[1]
    if is_hnd:
        cache = zeros((num_blocks, heads, case.block_size, stored), dtype).transpose(1, 2)
    else:
        cache = zeros((num_blocks, case.block_size, heads, stored), dtype)
    shape = scale_shape(cache_format, num_blocks, case.block_size, heads, dim)
    if shape is None:
        return cache, None
    is_per_token = len(shape) > 1
    if is_hnd and is_per_token:
        shape = (num_blocks, heads, case.block_size, *shape[3:])
    scale = torch.ones(shape, dtype=torch.bfloat16 if cache_format is CacheFormat.INT4 else torch.float32)
    return cache, scale.transpose(1, 2) if is_hnd and is_per_token else scale


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory such as `KVStorage` has: in huge pages where the system gives them. All operators' keys and values lie in such."""
    return zero_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


@functools.cache
def _base(dtype: torch.dtype) -> Tensor:
    # A prime number of them: repeated over a tensor, no two rows begin alike.
    return torch.from_numpy(np.random.default_rng(0).standard_normal(4_000_037, np.float32)).to(dtype)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, repeated where there are many: drawing a gigabyte anew would take longer than all the timing."""
    base = _base(dtype).roll(7919 * (seed + 1))
    count = math.prod(shape)
    out = zeros((count,), dtype)
    for start in range(0, count, len(base)):
        end = min(start + len(base), count)
        out[start:end] = base[: end - start]
    return out.view(shape)
