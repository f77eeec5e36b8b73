"""Random batches, each feature often beside each other one, and the simplest that fails like a given one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from batches import Batch
from caches import DTYPES, FORMATS, FP8, LAYOUTS

__all__ = ["BLOCK_SIZES", "GROUP_COUNTS", "HEAD_DIMS", "fitting_groups", "random_batch", "simplest"]

BLOCK_SIZES = (16, 1, 2, 3, 5, 8, 17, 32, 256)
HEAD_DIMS = (64, 16, 40, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 8)
GROUP_COUNTS = (1, 2, 4, 5, 8)


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
    groups = (fitting_groups(batch.int4_groups[0], batch.head_dim), fitting_groups(batch.int4_groups[1], value_dim))
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


def fitting_groups(num_groups: int, dim: int) -> int:
    """`num_groups` if it leaves an even number of channels to each, else 1."""
    return num_groups if dim % (2 * num_groups) == 0 else 1
