"""Ragged batches for attention: small descriptions that build their tensors from a seed.

A `Batch` holds plain numbers only, and its repr is code: what a failing test prints builds the same tensors again. Every
slot and table entry that a backend has no business reading is poisoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from caches import CACHE_DTYPES, FP8, Described, empty_caches, normal
from torch import Tensor

from pagedkv.attention import AttentionPlan, paged_attention, plan

__all__ = ["Batch", "one_thread"]

GARBAGE_IDS = (2**31 - 1, -7, -1, -(2**31))
NUM_SPARE_BLOCKS = 2


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: where tests run side by side, threads that wait for one another cost more than they bring."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True, repr=False)
class Batch(Described):
    """What to attend to, in plain numbers.

    lens:        (query tokens, sequence length) of each sequence
    dtype:       of the query, and of a float cache
    cache:       a `CacheFormat`'s value
    fp8_scale:   "none", "tensor" or "head"
    int4_groups: groups of channels of keys and of values
    layout:      how the caches lie, see `_cache_bases`
    query_scale: standard deviation of the query; 4 makes softmax peaked
    has_unwritten_drafts: whether some drafts are seen by no query, and poisoned
    out:         "new", "given", or "strided" for a given one with gaps
    """

    lens: tuple[tuple[int, int], ...]
    seed: int = 0
    dtype: str = "float32"
    cache: str = "float"
    fp8_scale: str = "none"
    int4_groups: tuple[int, int] = (1, 1)
    block_size: int = 16
    num_kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    value_dim: int = 64
    layout: str = "nhd"
    shares_blocks: bool = False
    has_wide_tables: bool = False
    has_packed_query: bool = False
    out: str = "new"
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    query_scale: float = 1.0
    has_sinks: bool = False
    has_alibi: bool = False
    has_tree_mask: bool = False
    has_unwritten_drafts: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def num_tokens(self) -> int:
        return sum(num_queries for num_queries, _ in self.lens)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `paged_attention` that are no tensors."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The arguments that are tensors. Nobody writes to them: they are kept for the next call."""
        return _build(self, device)

    def call(
        self,
        backend: str | None,
        *,
        plan: AttentionPlan | None = None,
        device: str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE by `backend`, or by the one that is picked."""
        room = self._room(device)
        out = None if room is None else room[1:-1, :, : self.value_dim]
        result, lse = paged_attention(
            **self.tensors(device), **self.options, out=out, return_lse=True, plan=plan, backend=backend
        )
        if room is not None and out is not None:
            assert result.data_ptr() == out.data_ptr()
            result = result.clone()
            out.fill_(torch.nan)
            assert room.isnan().all(), "something was written beside out"
        return result, lse

    def truth(self) -> tuple[Tensor, Tensor]:
        """Output and LSE in float64, by the reference, from the very numbers that the cache holds."""
        return _truth(self)

    def plan(self, backend: str | None, *, device: str = "cpu") -> AttentionPlan:
        """The plan of this batch for `backend`."""
        tensors = self.tensors()
        return plan(
            tensors["seq_lens"].numpy(),
            tensors["query_start_loc"].numpy(),
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            causal=self.causal,
            window=self.window,
            block_tables=tensors["block_tables"].numpy(),
            num_blocks=tensors["key_cache"].shape[0],
            block_size=self.block_size,
            device=device,
            backend=backend,
        )

    def _room(self, device: str) -> Tensor | None:
        """NaN, with a token more on either side of the output and, if it is strided, three channels more."""
        if self.out == "new":
            return None
        gap = 3 if self.out == "strided" else 0
        shape = (self.num_tokens + 2, self.num_q_heads, self.value_dim + gap)
        return torch.full(shape, torch.nan, dtype=self.torch_dtype, device=device)


@lru_cache(maxsize=256)
@one_thread()
def _truth(batch: Batch) -> tuple[Tensor, Tensor]:
    tensors = dict(batch.tensors())
    tensors["query"] = tensors["query"].double()
    if batch.cache == "float":
        tensors["key_cache"], tensors["value_cache"] = tensors["key_cache"].double(), tensors["value_cache"].double()
    out, lse = paged_attention(**tensors, **batch.options, return_lse=True, backend="reference")
    return out, lse


@lru_cache(maxsize=4)
@one_thread()
def _build(batch: Batch, device: str) -> dict[str, Tensor]:
    rng = np.random.default_rng(batch.seed)
    tables, num_blocks = _tables(batch, rng)
    tree_mask = None
    if batch.has_unwritten_drafts:
        tree_mask = _tree_mask(batch, rng)
    is_used = _used_slots(batch, tables, num_blocks, tree_mask)
    caches = _caches(batch, is_used, rng, device)
    num_heads = batch.num_q_heads + (2 * batch.num_kv_heads if batch.has_packed_query else 0)
    query = normal(rng, (batch.num_tokens, num_heads, batch.head_dim)) * batch.query_scale
    query = query.to(batch.torch_dtype).to(device)[:, : batch.num_q_heads]
    starts = np.concatenate(([0], np.cumsum([num_queries for num_queries, _ in batch.lens], dtype=np.int64)))
    tensors = {
        "query": query,
        **caches,
        "block_tables": _to(tables, device, is_wide=batch.has_wide_tables),
        "seq_lens": _to(np.array([length for _, length in batch.lens], np.int32), device),
        "query_start_loc": _to(starts.astype(np.int32), device),
    }
    if batch.has_sinks:
        # A head without a sink is one whose sink is -inf.
        sinks = rng.normal(0, 2, batch.num_q_heads).astype(np.float32)
        tensors["sinks"] = _to(np.where(rng.random(batch.num_q_heads) < 0.1, -np.inf, sinks), device)
    if batch.has_alibi:
        tensors["alibi_slopes"] = _to(rng.uniform(0, 0.5, batch.num_q_heads).astype(np.float32), device)
    if batch.has_tree_mask:
        tensors["tree_mask"] = _to(_tree_mask(batch, rng) if tree_mask is None else tree_mask, device)
    return tensors


def _to(array: np.ndarray, device: str, *, is_wide: bool = False) -> Tensor:
    if is_wide:
        padded = np.full((array.shape[0], array.shape[1] + 3), GARBAGE_IDS[0], array.dtype)
        padded[:, : array.shape[1]] = array
        return torch.from_numpy(padded).to(device)[:, : array.shape[1]]
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _used_columns(batch: Batch, seq_idx: int) -> tuple[int, int]:
    """The table entries of a sequence that a query may read."""
    num_queries, length = batch.lens[seq_idx]
    if num_queries == 0:
        return 0, 0
    left = None if batch.window is None else batch.window[0]
    first_key = 0 if left is None else max(length - num_queries - left, 0)
    end = -(-length // batch.block_size)
    return min(first_key // batch.block_size, end), end


def _tables(batch: Batch, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Block tables over shuffled blocks, garbage where nobody may look, and the number of blocks."""
    columns = [_used_columns(batch, i) for i in range(len(batch.lens))]
    num_columns = max((end for _, end in columns), default=0) + int(rng.integers(0, 3))
    num_blocks = sum(end - first for first, end in columns) + NUM_SPARE_BLOCKS
    ids = rng.permutation(num_blocks).astype(np.int32)
    tables = rng.choice(np.array([*GARBAGE_IDS, num_blocks, ids[-1]], np.int32), (len(columns), num_columns))
    taken = 0
    for row, (first, end) in zip(tables, columns, strict=True):
        row[first:end] = ids[taken : taken + end - first]
        if batch.shares_blocks and taken:
            is_shared = rng.random(end - first) < 0.5
            row[first:end][is_shared] = rng.choice(ids[:taken], int(is_shared.sum()))
        taken += end - first
    return tables, num_blocks


def _used_slots(batch: Batch, tables: np.ndarray, num_blocks: int, tree_mask: np.ndarray | None) -> np.ndarray:
    """(blocks, block_size) bool: slots that hold a token of some sequence; with a tree mask, one that some query sees."""
    is_used = np.zeros((num_blocks, batch.block_size), bool)
    start = 0
    for seq_idx, (num_queries, length) in enumerate(batch.lens):
        first, end = _used_columns(batch, seq_idx)
        positions = np.arange(first * batch.block_size, min(end * batch.block_size, length))
        if tree_mask is not None:
            unseen = _unseen_drafts(tree_mask[start : start + num_queries])
            positions = np.setdiff1d(positions, unseen + length - num_queries)
        start += num_queries
        is_used[tables[seq_idx, positions // batch.block_size], positions % batch.block_size] = True
    return is_used


def _unseen_drafts(tree_mask: np.ndarray) -> np.ndarray:
    """Which of a sequence's query tokens neither itself nor a later one sees. tree_mask: (query tokens, words)."""
    bits = np.unpackbits(np.ascontiguousarray(tree_mask).view(np.uint8), axis=1, bitorder="little")
    return np.flatnonzero(~np.tril(bits[:, : len(bits)]).any(0))


def _caches(batch: Batch, is_used: np.ndarray, rng: np.random.Generator, device: str) -> dict[str, Tensor]:
    num_blocks, block_size = is_used.shape
    shape = (num_blocks, block_size, batch.num_kv_heads)
    packing = 2 if batch.cache == "int4" else 1
    dims = (batch.head_dim // packing, batch.value_dim // packing)
    cache_dtype = CACHE_DTYPES.get(batch.cache, batch.torch_dtype)
    key_cache, value_cache = empty_caches(batch.layout, shape, dims, cache_dtype, device)
    unused = torch.from_numpy(~is_used).to(device)
    tensors = {"key_cache": key_cache, "value_cache": value_cache}
    scales: list[Tensor | None] = []
    is_latent = batch.layout == "latent"
    for cache, groups in ((key_cache, batch.int4_groups[0]), (value_cache, batch.int4_groups[1])):
        if not (is_latent and cache is value_cache):
            _fill(cache, _codes(batch.cache, tuple(cache.shape), rng).to(cache_dtype).to(device), unused)
        scales.append(_scale(batch, shape, groups, rng, unused, device))
    if is_latent:
        scales[1] = scales[0]
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if scale is not None:
            tensors[name] = scale
    return tensors


def _codes(cache: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    if cache == "int8":
        return torch.from_numpy(rng.integers(-127, 128, shape, dtype=np.int8))
    if cache == "int4":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    return normal(rng, shape)


def _fill(cache: Tensor, codes: Tensor, unused: Tensor) -> None:
    cache.copy_(codes)
    if cache.dtype in (torch.int8, torch.uint8):
        # No code is a NaN; the scales of these slots are.
        return
    poison = torch.full((), torch.nan, dtype=torch.float32, device=cache.device).to(cache.dtype)
    if cache.dtype in FP8.values():
        # fp8 has no indexed assignment; its bytes have.
        cache.view(torch.uint8)[unused] = poison.view(torch.uint8)
    else:
        cache[unused] = poison


def _scale(
    batch: Batch, shape: tuple[int, int, int], groups: int, rng: np.random.Generator, unused: Tensor, device: str
) -> Tensor | None:
    if batch.cache in FP8 and batch.fp8_scale != "none":
        size = () if batch.fp8_scale == "tensor" else (batch.num_kv_heads,)
        return torch.from_numpy(np.asarray(rng.uniform(0.5, 2, size), np.float32)).to(device)
    if batch.cache not in ("int8", "int4"):
        return None
    num_blocks, block_size, heads = shape
    is_hnd = batch.layout in ("hnd", "joint_hnd", "side_by_side")
    lying = (num_blocks, heads, block_size) if is_hnd else shape
    if batch.cache == "int8":
        scale = torch.from_numpy(rng.uniform(0.5, 2, lying).astype(np.float32) / 60)
    else:
        step = torch.from_numpy(rng.uniform(0.1, 0.3, (*lying, groups)).astype(np.float32))
        minimum = torch.from_numpy(rng.uniform(-2.5, -0.5, (*lying, groups)).astype(np.float32))
        scale = torch.stack((step, minimum), dim=-1).bfloat16()
    scale = scale.to(device)
    scale = scale.transpose(1, 2) if is_hnd else scale
    # NaN times any code is NaN; infinity is what a scale of old times may have become.
    scale[unused] = torch.nan if rng.random() < 0.75 else torch.inf
    return scale


def _tree_mask(batch: Batch, rng: np.random.Generator) -> np.ndarray:
    """Random bits, the ones past a sequence's query tokens too; nearly every query sees itself, as in any tree."""
    most = max((num_queries for num_queries, _ in batch.lens), default=0)
    num_words = -(-most // 32) + int(rng.integers(0, 2))
    bits = rng.random((batch.num_tokens, num_words * 32)) < 0.5
    start = 0
    for num_queries, _ in batch.lens:
        own = np.arange(num_queries)
        bits[start + own, own] = rng.random(num_queries) < 0.9
        if batch.has_unwritten_drafts:
            bits[start + own[:, None], own[rng.random(num_queries) < 0.3]] = False
        start += num_queries
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4").reshape(batch.num_tokens, num_words)
