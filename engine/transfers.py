"""From arrays on the host to tensors on the device, without waiting for either."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["sent", "staged"]


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor in pinned memory if `device` is a GPU, from where it is copied while the host goes on.

    Nobody has to keep it: torch's pinned allocator notes the stream of every copy that does not block, and hands the
    memory out again only when that copy has ended. So no transfer in flight is ever overwritten, and there is no ring
    of buffers to keep in order here. O(bytes).
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, in order with the current stream. On the CPU, a copy of it. O(bytes)."""
    host = torch.from_numpy(array)
    return staged(host, device).to(device, non_blocking=True) if device.type == "cuda" else host.clone()
