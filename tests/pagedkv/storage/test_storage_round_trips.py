"""I6, F6: pages that were swapped, copied on write or saved hold the same bits, NaN payloads and -0.0 included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from storage_contents import DTYPES, small_spec

from pagedkv import BlockCopies
from pagedkv.storage import KVStorage, Moves, read_saved

NUM_PAGES = 10_000
# Sign, quiet and signalling NaNs with payloads, infinities, subnormals, -0.0, in the widths that elements have.
SPECIAL = {
    "float64": (np.uint64, [0x7FF8DEADBEEF0001, 0xFFF0000000000001, 0x7FF0000000000000, 1, 0x8000000000000000]),
    "float32": (np.uint32, [0x7FC0BEEF, 0xFF800001, 0x7F800000, 1, 0x80000000]),
    "float16": (np.uint16, [0x7E01, 0xFC01, 0x7C00, 1, 0x8000]),
    "bfloat16": (np.uint16, [0x7FC1, 0xFF81, 0x7F80, 1, 0x8000]),
}


def pages(num_pages: int, dtype: str, seed: int) -> torch.Tensor:
    """Random bytes, into every page of which the special values of its dtype were put."""
    spec = small_spec(dtype)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (num_pages, spec.bytes_per_block), np.uint8)
    width, values = SPECIAL.get(dtype, (np.uint8, [0x7F, 0xFF, 0x80, 0x00, 0x7E]))
    elements = raw.view(width)
    elements[:, : len(values)] = np.array(values, width)
    return torch.from_numpy(raw)


def copies(sources: np.ndarray, targets: np.ndarray) -> BlockCopies:
    return BlockCopies(sources.astype(np.int64), targets.astype(np.int64))


def go_round(dtype: str, num_pages: int, path: Path, *, layout: str) -> None:
    """Out to the host, back in elsewhere, copied on write, saved and loaded elsewhere again: all shuffled each time."""
    spec, rng = small_spec(dtype), np.random.default_rng(7)
    storage = KVStorage(spec, 2 * num_pages, host_blocks=num_pages, layout=layout)
    content = pages(num_pages, dtype, seed=1)
    places = rng.permutation(num_pages)
    storage.write_blocks(places, content)
    host, back, copied = rng.permutation(num_pages), rng.permutation(num_pages), num_pages + rng.permutation(num_pages)
    storage.apply(Moves(swaps_out=copies(places, host)))
    storage.zero(np.arange(num_pages))
    storage.apply(Moves(swaps_in=copies(host, back)))
    assert torch.equal(storage.read_blocks(back), content)
    storage.apply(Moves(copies=copies(back, copied)))
    assert torch.equal(storage.read_blocks(copied), content)
    storage.save_blocks(path, copied)
    other = KVStorage(spec, num_pages, layout=layout)
    assert read_saved(path, spec, layout=layout).num_blocks == num_pages
    last = rng.permutation(num_pages)
    other.load_blocks(path, last)
    assert torch.equal(other.read_blocks(last), content)
    assert torch.equal(storage.read_blocks(back), content)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_pages_go_round_to_the_bit(tmp_path: Path, dtype: str) -> None:
    go_round(dtype, NUM_PAGES, tmp_path / "saved", layout="NHD")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_million_pages_go_round_to_the_bit(tmp_path: Path, dtype: str, layout: str) -> None:
    for part in range(10):
        go_round(dtype, 50_000, tmp_path / f"saved{part}", layout=layout)


@pytest.mark.parametrize("dtype", sorted(SPECIAL))
def test_the_pages_hold_nan_and_minus_zero(dtype: str) -> None:
    elements = pages(3, dtype, seed=1).view(getattr(torch, dtype))

    assert bool(torch.isnan(elements).any(dim=1).all())
    assert bool(((elements == 0) & torch.signbit(elements)).any(dim=1).all())
