"""Which tile is the fastest? The candidates for a shape, and how a call is made to take one."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from gpu_cases import Case, warm

from pagedkv.attention.triton_kernels import launch
from pagedkv.attention.triton_kernels.tiles import Tile

__all__ = ["candidates", "use_tile", "warm_tile"]


def candidates(case: Case) -> list[Tile]:
    """Tiles worth a try: rows as the shape wants them, keys, warps and stages around what is plausible."""
    group = case.heads[0] // case.heads[1]
    is_decode = case.seqs[0][0] * group <= max(group, 16)
    if case.is_latent:
        options: Any = itertools.product((32, 64), (16, 32, 64), (4, 8), (2, 3, 5))
    elif is_decode:
        options = itertools.product((16,), (32, 64, 128), (2, 4, 8), (3, 5, 7))
    else:
        options = itertools.product((64, 128), (32, 64, 128), (4, 8), (3, 5))
    return [Tile(*option) for option in options]


def use_tile(tile: Tile) -> AbstractContextManager[Any]:
    """Calls within take this tile."""
    return mock.patch.object(launch, "tile_for", return_value=tile)


def warm_tile(case: Case, tile: Tile) -> str | None:
    """Compile a tile into the cache on disk; why it does not run on this GPU, None if it does. For worker processes."""
    with use_tile(tile):
        return warm(case)
