"""Random ragged batches for attention and random writes: small descriptions that build their tensors from a seed.

A `Batch` holds plain numbers only, and its repr is code: what a failing test prints builds the same tensors again. Every
slot and table entry that a backend has no business reading is poisoned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttentionPlan, paged_attention, plan, write_kv

__all__ = ["Batch", "Write", "empty_caches", "one_thread", "random_batch", "random_write", "simplest"]

FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
CACHE_DTYPES = {**FP8, "int8": torch.int8, "int4": torch.uint8}
FORMATS = ("float", "int8", "fp8_e4m3", "fp8_e5m2", "int4")
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("nhd", "hnd", "joint", "joint_hnd", "side_by_side", "padded", "latent")
BLOCK_SIZES = (16, 1, 2, 3, 5, 8, 17, 32, 256)
HEAD_DIMS = (64, 16, 40, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 8)
GROUP_COUNTS = (1, 2, 4, 5, 8)
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


class _Described:
    """A dataclass whose repr names only what differs from the defaults, and is the code that makes it again."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Batch(_Described):
    """What to attend to, in plain numbers.

    lens:        (query tokens, sequence length) of each sequence
    dtype:       of the query, and of a float cache
    cache:       a `CacheFormat`'s value
    fp8_scale:   "none", "tensor" or "head"
    int4_groups: groups of channels of keys and of values
    layout:      how the caches lie, see `_cache_bases`
    query_scale: standard deviation of the query; 4 makes softmax peaked
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
    is_used = _used_slots(batch, tables, num_blocks)
    caches = _caches(batch, is_used, rng, device)
    num_heads = batch.num_q_heads + (2 * batch.num_kv_heads if batch.has_packed_query else 0)
    query = _normal(rng, (batch.num_tokens, num_heads, batch.head_dim)) * batch.query_scale
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
        tensors["tree_mask"] = _to(_tree_mask(batch, rng), device)
    return tensors


def _to(array: np.ndarray, device: str, *, is_wide: bool = False) -> Tensor:
    if is_wide:
        padded = np.full((array.shape[0], array.shape[1] + 3), GARBAGE_IDS[0], array.dtype)
        padded[:, : array.shape[1]] = array
        return torch.from_numpy(padded).to(device)[:, : array.shape[1]]
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


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


def _used_slots(batch: Batch, tables: np.ndarray, num_blocks: int) -> np.ndarray:
    """(blocks, block_size) bool: slots that hold a token of some sequence."""
    is_used = np.zeros((num_blocks, batch.block_size), bool)
    for seq_idx, (_, length) in enumerate(batch.lens):
        first, end = _used_columns(batch, seq_idx)
        positions = np.arange(first * batch.block_size, min(end * batch.block_size, length))
        is_used[tables[seq_idx, positions // batch.block_size], positions % batch.block_size] = True
    return is_used


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


def _codes(cache: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    if cache == "int8":
        return torch.from_numpy(rng.integers(-127, 128, shape, dtype=np.int8))
    if cache == "int4":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    return _normal(rng, shape)


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
        start += num_queries
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4").reshape(batch.num_tokens, num_words)


def random_batch(
    seed: int,
    *,
    dtypes: tuple[str, ...] = DTYPES,
    formats: tuple[str, ...] = FORMATS,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    max_seqs: int = 5,
) -> Batch:
    """Any batch that `paged_attention` takes, mostly small ones. The same seed gives the same batch.

    Drawn feature by feature, Hypothesis repeats itself and prefers the plainest: of 150 batches 104 were different, and
    two had a window to the right. Here every pair of features meets; `simplest` does the shrinking.
    """
    rng = np.random.default_rng(seed)
    features = _features(rng, formats, head_dims)
    # A quarter of the batches are plain but for a few features, so that what one does is not hidden by another.
    if rng.random() < 0.25:
        dropped = rng.permutation(list(features))[4:]
        features = {name: value for name, value in features.items() if name not in dropped or name == "cache"}
    lens = tuple(_lengths(rng, features.get("block_size", 16)) for _ in range(int(rng.integers(1, max_seqs + 1))))
    return _consistent(Batch(lens, seed=seed, dtype=str(rng.choice(dtypes)), **features))


def _lengths(rng: np.random.Generator, block_size: int) -> tuple[int, int]:
    num_queries = int(
        rng.choice((1, 1, int(rng.integers(0, 10)), int(rng.integers(0, 10)), 40), p=(0.2, 0.2, 0.2, 0.3, 0.1))
    )
    cached = int(rng.choice((0, int(rng.integers(41)), int(rng.integers(min(3 * block_size, 300) + 1)))))
    if rng.random() < 0.85:
        return num_queries, num_queries + cached
    # More queries than tokens: the first of them stand before the sequence, and see nothing.
    return num_queries, max(num_queries - int(rng.choice((1, 3, int(rng.integers(40))))), 0)


def simplest(batch: Batch, fails: Callable[[Batch], bool]) -> Batch:
    """The simplest batch that still fails, by leaving out sequences and features and shortening, one after another."""
    while True:
        simpler = next((candidate for candidate in _simpler(batch) if fails(candidate)), None)
        if simpler is None:
            return batch
        batch = simpler


def _simpler(batch: Batch) -> Iterator[Batch]:
    for i, (num_queries, length) in enumerate(batch.lens):
        before, after = batch.lens[:i], batch.lens[i + 1 :]
        if len(batch.lens) > 1:
            yield dataclasses.replace(batch, lens=before + after)
        for shorter in ((num_queries, length // 2), (num_queries, length - 1), (num_queries // 2, length)):
            if shorter != batch.lens[i] and min(shorter) >= 0:
                yield dataclasses.replace(batch, lens=(*before, shorter, *after))
    for field in dataclasses.fields(batch):
        if field.name not in ("lens", "seed") and getattr(batch, field.name) != field.default:
            simpler = _consistent(dataclasses.replace(batch, **{field.name: field.default}))
            if simpler != batch:
                yield simpler


def _features(rng: np.random.Generator, formats: tuple[str, ...], head_dims: tuple[int, ...]) -> dict[str, Any]:
    """Everything about a batch but its lengths and dtype, at random, each feature often enough to meet each other one."""

    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    def happens(probability: float) -> bool:
        return bool(rng.random() < probability)

    # Plain floats more often than each other format: most of what can go wrong does not depend on the format.
    is_plain = happens(0.3) and "float" in formats
    head_dim = one_of(*head_dims)
    return {
        "cache": "float" if is_plain else one_of(*formats),
        "fp8_scale": one_of("none", "tensor", "head", "head"),
        "int4_groups": (one_of(*GROUP_COUNTS), one_of(*GROUP_COUNTS)),
        "block_size": one_of(*BLOCK_SIZES),
        "num_kv_heads": one_of(1, 2, 3),
        "group": one_of(*GROUPS),
        "head_dim": head_dim,
        "value_dim": one_of(*head_dims) if happens(0.4) else head_dim,
        "layout": one_of(*LAYOUTS),
        "shares_blocks": happens(0.5),
        "has_wide_tables": happens(0.5),
        "has_packed_query": happens(0.5),
        "out": one_of("new", "given", "strided"),
        "causal": happens(0.65),
        "window": (one_of(None, 0, int(rng.integers(40))), one_of(None, 0, int(rng.integers(9))))
        if happens(0.4)
        else None,
        "softcap": one_of(None, None, 2.0, 30.0),
        "scale": one_of(None, None, 0.3),
        "query_scale": one_of(1.0, 4.0),
        "has_sinks": happens(0.35),
        "has_alibi": happens(0.3),
        "has_tree_mask": happens(0.25),
    }


def _consistent(batch: Batch) -> Batch:
    """The nearest batch that `paged_attention` takes."""
    value_dim, layout = batch.value_dim, batch.layout
    if layout == "latent" and batch.cache in ("int8", "int4"):
        layout = "nhd"
    if layout in ("joint", "joint_hnd"):
        value_dim = batch.head_dim
    if layout == "latent":
        value_dim = min(value_dim, batch.head_dim)
    is_int4 = batch.cache == "int4"
    groups = (_fitting_groups(batch.int4_groups[0], batch.head_dim), _fitting_groups(batch.int4_groups[1], value_dim))
    return dataclasses.replace(
        batch,
        layout=layout,
        value_dim=value_dim,
        fp8_scale=batch.fp8_scale if batch.cache in FP8 else "none",
        int4_groups=groups if is_int4 else (1, 1),
        causal=batch.causal or batch.has_tree_mask,
        window=None if batch.has_tree_mask else batch.window,
        has_alibi=batch.has_alibi and not batch.has_tree_mask,
    )


def _fitting_groups(num_groups: int, dim: int) -> int:
    """`num_groups` if it leaves an even number of channels to each, else 1."""
    return num_groups if dim % (2 * num_groups) == 0 else 1


@dataclass(frozen=True, repr=False)
class Write(_Described):
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
            new = (_normal(rng, (self.num_tokens, num_heads, dim)) * self.magnitude).to(dtype).to(device)
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
    groups = (_fitting_groups(one_of(*GROUP_COUNTS), head_dim), _fitting_groups(one_of(*GROUP_COUNTS), value_dim))
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
