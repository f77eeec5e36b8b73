"""Plans: what storage must do on tensors for the bookkeeping to come true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import BlockIds

__all__ = ["NO_COPIES", "BlockCopies"]


@dataclass(frozen=True, slots=True, eq=False)
class BlockCopies:
    """Copy block `sources[i]` to block `targets[i]`, whole blocks, in this order.

    sources, targets: (n,) int64. Within the device for copy-on-write; device to host for a swap out; host to device
    for a swap in.
    """

    sources: BlockIds
    targets: BlockIds

    def __len__(self) -> int:
        return len(self.sources)

    def __add__(self, other: BlockCopies) -> BlockCopies:
        """Both plans, this one first."""
        if not len(other):
            return self
        return BlockCopies(np.concatenate((self.sources, other.sources)), np.concatenate((self.targets, other.targets)))


NO_COPIES = BlockCopies(np.empty(0, np.int64), np.empty(0, np.int64))
