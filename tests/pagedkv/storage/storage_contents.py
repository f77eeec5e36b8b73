"""What the tests of storage share: random bytes, a model of what moves do, and a fault at any line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import torch

import pagedkv.storage
from pagedkv import BlockCopies
from pagedkv.storage import KVSpec, KVStorage

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int4"]
FOLDER = str(Path(pagedkv.storage.__file__).parent)
Contents = dict[str, np.ndarray]


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int64)


def pairs(*moves: tuple[int, int]) -> BlockCopies:
    """(source, target), ..."""
    return BlockCopies(ids(*(source for source, _ in moves)), ids(*(target for _, target in moves)))


def small_spec(dtype: str = "bfloat16", **shape: int) -> KVSpec:
    return KVSpec(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "block_size": 2, **shape}, dtype=dtype)


def filled(
    spec: KVSpec, num_blocks: int, num_host_blocks: int = 0, *, device: str = "cpu", seed: int = 0, **options: str
) -> KVStorage:
    """A storage full of random bytes: NaNs with payloads, infinities, zeros of both signs, whatever the dtype has."""
    storage = KVStorage(spec, num_blocks, device, num_host_blocks, **options)
    rng = np.random.default_rng(seed)
    for where, count in (("device", num_blocks), ("host", num_host_blocks)):
        raw = rng.integers(0, 256, (count, spec.bytes_per_block), np.uint8)
        storage.write_blocks(np.arange(count), torch.from_numpy(raw), where=where)
    return storage


def raw_bytes(view: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, with a last dimension for the bytes of an element."""
    return view.unsqueeze(-1).view(torch.uint8)


def contents(storage: KVStorage) -> Contents:
    return {
        "device": storage.read_blocks(np.arange(storage.num_blocks)).numpy(),
        "host": storage.read_blocks(np.arange(storage.num_host_blocks), where="host").numpy(),
    }


def assert_same(found: Contents, expected: Contents) -> None:
    for where in ("device", "host"):
        np.testing.assert_array_equal(found[where], expected[where], err_msg=where)


def carried_out(before: Contents, swaps_out: BlockCopies, copies: BlockCopies, swaps_in: BlockCopies) -> Contents:
    """The model: one block after the other."""
    after = {where: blocks.copy() for where, blocks in before.items()}
    for moves, source, target in (
        (swaps_out, "device", "host"),
        (copies, "device", "device"),
        (swaps_in, "host", "device"),
    ):
        for source_id, target_id in zip(moves.sources.tolist(), moves.targets.tolist(), strict=True):
            after[target][target_id] = after[source][source_id]
    return after


class Fault(BaseException):
    """As an interrupt from the keyboard: no `except Exception` sees it."""


def fail_at_line(k: int, call: Callable[[], object]) -> bool:
    """Call, with a fault at the k-th line that runs in the storage package. Returns whether it came to that."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal num_lines
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            num_lines += 1
            if num_lines == k:
                raise Fault
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Fault:
        return True
    finally:
        sys.settrace(previous)
    return False


def shuffled(rng: np.random.Generator, among: int, count: int) -> Sequence[int]:
    return rng.permutation(among)[:count].tolist()
