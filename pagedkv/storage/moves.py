"""Which copies a plan asks for: checked, in order, contiguous ones in one piece. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import BlockIds
from pagedkv.errors import BlockStateError, InvalidArgumentError
from pagedkv.plans import NO_COPIES, BlockCopies

__all__ = ["BlockMoves", "Moves", "Run", "checked_block_ids", "checked_distinct", "checked_runs", "runs_of"]


class BlockMoves(Protocol):
    """What storage reads of a plan; a scheduler's `StepPlan` is one."""

    @property
    def swaps_out(self) -> BlockCopies:
        """Device to host; carried out first."""

    @property
    def copies(self) -> BlockCopies:
        """Device to device, one after the other: a target may be a later one's source."""

    @property
    def swaps_in(self) -> BlockCopies:
        """Host to device; carried out after the copies."""

    @property
    def taken(self) -> BlockIds:
        """(n,) int64, device blocks that were handed out: wiped last, unless something was copied to them."""


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Moves without a scheduler: `storage.apply(Moves(copies=manager.append("a", 1).copies))`."""

    swaps_out: BlockCopies = NO_COPIES
    copies: BlockCopies = NO_COPIES
    swaps_in: BlockCopies = NO_COPIES
    taken: BlockIds = field(default_factory=lambda: NO_COPIES.sources)


class Run(NamedTuple):
    """`num_blocks` neighbours from `source` on go to `target` and after."""

    source: int
    target: int
    num_blocks: int


def checked_runs(name: str, copies: BlockCopies, num_sources: int, num_targets: int, *, is_within: bool) -> list[Run]:
    """The runs of one list of copies, in order. O(n log n).

    `is_within`: sources and targets are blocks of the same memory. Then every block is a run of its own: a piece that
    overlaps its own target has no order, and copies on write are of single blocks anyway. A block that is copied onto
    itself is left out: torch refuses to, in the middle of all the others.

    Raises BlockStateError for ids that are no block and for a target that stands twice, InvalidArgumentError for what
    are no copies or no ids.
    """
    if not isinstance(copies, BlockCopies):
        raise InvalidArgumentError(f"{name} must be BlockCopies(sources, targets), found {type(copies).__name__}")
    if not len(copies.sources) and not len(copies.targets):
        return []
    sources = checked_block_ids(f"{name}.sources", copies.sources, num_sources)
    targets = checked_distinct(f"{name}.targets", copies.targets, num_targets)
    if len(sources) != len(targets):
        raise InvalidArgumentError(f"{name} has {len(sources)} sources and {len(targets)} targets")
    if is_within:
        both = zip(sources.tolist(), targets.tolist(), strict=True)
        return [Run(source, target, 1) for source, target in both if source != target]
    return runs_of(sources, targets)


def checked_block_ids(name: str, block_ids: BlockIds, num_blocks: int) -> BlockIds:
    """`block_ids` as int64. Raises InvalidArgumentError unless they are one row of whole numbers, BlockStateError unless
    each is a block. O(n).
    """
    try:
        ids = np.asarray(block_ids)
    except ValueError as error:  # A ragged list.
        raise InvalidArgumentError(f"{name} must be one row of block ids: {error}") from None
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise InvalidArgumentError(f"{name} must be one row of block ids, found {ids.dtype} of {ids.shape}")
    is_wrong = (ids < 0) | (ids >= num_blocks)
    if is_wrong.any():
        raise BlockStateError(f"{name}: there is no block {ids[is_wrong][0]} among {num_blocks}")
    return ids.astype(np.int64)


def checked_distinct(name: str, block_ids: BlockIds, num_blocks: int) -> BlockIds:
    """As `checked_block_ids`; raises BlockStateError also for a block that stands twice. O(n log n)."""
    ids = checked_block_ids(name, block_ids, num_blocks)
    in_order = np.sort(ids)
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        raise BlockStateError(f"{name}: block {int(twice[0])} stands there twice")
    return ids


def runs_of(sources: BlockIds, targets: BlockIds) -> list[Run]:
    """Merge neighbours in the list that are neighbours in both memories. O(n).

    >>> [tuple(run) for run in runs_of(np.array([4, 5, 6, 9]), np.array([0, 1, 3, 4]))]
    [(4, 0, 2), (6, 3, 1), (9, 4, 1)]
    """
    if not len(sources):
        return []
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(sources) != 1) | (np.diff(targets) != 1))))
    lengths = np.diff(np.append(starts, len(sources)))
    return [Run(*run) for run in zip(sources[starts].tolist(), targets[starts].tolist(), lengths.tolist(), strict=True)]
