"""Memory of the host that blocks lie in: in huge pages, and page-locked where a GPU copies from and to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import cdiv

__all__ = ["pinned_zero_bytes", "unpin", "zero_bytes"]

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


def zero_bytes(num_bytes: int) -> Tensor:
    """`num_bytes` zeros that begin where a huge page does. O(num_bytes): the memory is taken now, not at first use.

    From numpy, which asks Linux for huge pages beneath large arrays, where torch does not. With pages of 4 KiB, blocks that lie
    anywhere cost walks through the page tables (docs/benchmarks.md).
    """
    memory = torch.from_numpy(np.empty(num_bytes + HUGE_PAGE_BYTES, np.uint8))
    start = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[start : start + num_bytes].zero_()


def pinned_zero_bytes(num_bytes: int) -> Tensor:
    """At least `num_bytes` zeros in page-locked memory, in whole pages, which `unpin` gives free.

    Not by `pin_memory=True`: torch's allocator rounds up to a power of two, up to twice what was asked for
    (pytorch/pytorch#95823). Whole pages of our own, because a page that is registered twice is an error.
    """
    pages = zero_bytes(cdiv(num_bytes, PAGE_BYTES) * PAGE_BYTES)
    if len(pages):
        status = int(_cudart().cudaHostRegister(pages.data_ptr(), len(pages), 0))
        if status:
            raise RuntimeError(f"CUDA cannot page-lock {len(pages)} bytes of host memory: error {status}")
    return pages


def unpin(pages: Tensor, device: torch.device) -> None:
    """Give free what `pinned_zero_bytes` locked, once the device has no copy under way."""
    torch.cuda.synchronize(device)
    _cudart().cudaHostUnregister(pages.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
