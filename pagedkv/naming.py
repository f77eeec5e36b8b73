"""Naming the blocks that rows fill, in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from pagedkv.arrays import BlockIds, Int64s, Rows
from pagedkv.block_keys import Key
from pagedkv.errors import BlockStateError
from pagedkv.known_tokens import MOST_DEFERRED, KnownTokens
from pagedkv.prefix_cache import PrefixCache
from pagedkv.sequences import SequenceTable

__all__ = ["BlockNaming", "in_order_of_steps"]

T = TypeVar("T")


def in_order_of_steps(counts: Int64s, first_steps: Int64s, period: int) -> tuple[Int64s, Int64s]:
    """Things that happen to row i `counts[i]` times: first in step `first_steps[i]`, then every `period` steps.

    Returns, for each of them in order of steps, then rows, to which row it happens and in which step.

    >>> owners, steps = in_order_of_steps(np.array([2, 1]), np.array([3, 1]), period=4)
    >>> owners.tolist(), steps.tolist()
    ([1, 0, 0], [1, 3, 7])
    """
    owners = counts.nonzero()[0]
    total = int(np.add.reduce(counts))
    if total == len(owners):
        steps = first_steps[owners]
    else:
        owners = owners.repeat(counts[owners])
        nth = np.arange(total) - (counts.cumsum() - counts)[owners]
        steps = first_steps[owners] + nth * period
    order = steps.argsort(kind="stable")
    return owners[order], steps[order]


class BlockNaming:
    """Names blocks when the plan that fills them is made, and remembers what a step named, in case it fails.

    A row names a block only while all of its blocks before it are the named ones: `num_named` says how many are.

    Blocks that decodes fill may wait a few steps for their names (`defer`), since to name those of several steps together
    takes much less than to fetch code and data for a few in each. `catch_up` names them in the order in which they were
    filled; whoever is about to look for a name, to give one, or to let go of blocks calls it before. Evictions do not: a
    duplicate gets its name if the block that it equals was evicted while it waited. Nobody can tell otherwise.

    Where there is no memory for names, blocks stay without: they are not shared, and nothing else is lost. To raise
    would be worse, since by then the blocks are in their tables, and copies on write are planned.
    """

    __slots__ = (
        "_age",
        "_cache",
        "_deferred",
        "_most_deferred",
        "_named_in_step",
        "_num_before_step",
        "_table",
        "_tokens",
    )

    def __init__(self, cache: PrefixCache, table: SequenceTable, tokens: KnownTokens) -> None:
        self._cache = cache
        self._table = table
        self._tokens = tokens
        # With their keys: a block may have been let go of, and named anew, by the time the step is over.
        self._named_in_step: list[tuple[BlockIds, Sequence[Key]]] | None = None
        # Rows and block indices, one pair of arrays a step: how many of them were there when the step under way began,
        # and for how many steps the first has waited. A row fills its next block only when all these have names.
        self._deferred: list[tuple[Rows, Int64s]] = []
        self._num_before_step = 0
        self._age = 0
        # Policies that are told of names are told at once.
        self._most_deferred = 1 if cache.tracks_names else min(MOST_DEFERRED, table.block_size)

    def begin_step(self) -> None:
        """A step is being planned: from here on, remember what is named. Raises BlockStateError if another is under way."""
        if self._named_in_step is not None:
            raise BlockStateError("another step is under way on this memory: it must end first")
        self._named_in_step = []
        self._num_before_step = len(self._deferred)

    def end_step(self) -> None:
        """The step is over: remember no more. O(1)."""
        self._named_in_step = None

    def take_back(self) -> list[int]:
        """The step failed: what it filled, and has no name yet, gets none. Returns the blocks that it named. O(named)."""
        del self._deferred[self._num_before_step :]
        named, self._named_in_step = self._named_in_step or [], None
        keys_of: dict[int, Key] = {}
        for block_ids, keys in named:
            keys_of.update(zip(block_ids.tolist(), keys, strict=True))
        return [block_id for block_id, key in keys_of.items() if self._cache.key_of(block_id) == key]

    def apart(self, append: Callable[..., T], *arguments: Any) -> T:
        """Call it: what it names belongs to no step, such as one that a scheduler is planning on the same memory."""
        self.catch_up()
        named, self._named_in_step = self._named_in_step, None
        try:
            return append(*arguments)
        finally:
            self._named_in_step = named

    def written(self, block_ids: BlockIds) -> BlockIds:
        """The blocks before the first one that the step under way has named, and so is yet to write. O(n + named)."""
        if not self._named_in_step or not len(block_ids):
            return block_ids
        is_unwritten = np.isin(block_ids, np.concatenate([named for named, _ in self._named_in_step]))
        return block_ids[: is_unwritten.argmax()] if is_unwritten.any() else block_ids

    def defer(self, rows: Rows, block_idx: Int64s) -> None:
        """A step fills block `block_idx[i]` of each row, if any: name them, now or a few steps later. O(rows).

        Called once a step at most, and no row gets more than one token in it.
        """
        if len(rows):
            self._deferred.append((rows, block_idx))
        if self._deferred:
            self._age += 1
            if self._age >= self._most_deferred:
                self.catch_up()

    def catch_up(self) -> None:
        """Name what `defer` left, and store all known tokens of full blocks. O(blocks), O(1) if there are none."""
        self._tokens.store_filled()
        if not self._deferred:
            return
        deferred, self._deferred, self._age = self._deferred, [], 0
        num_before, self._num_before_step = self._num_before_step, 0
        named_in_step, self._named_in_step = self._named_in_step, None
        if named_in_step is None:
            num_before = len(deferred)
        self._name_deferred(deferred[:num_before])
        self._named_in_step = named_in_step
        self._name_deferred(deferred[num_before:])

    def _name_deferred(self, deferred: list[tuple[Rows, Int64s]]) -> None:
        if deferred:
            rows, block_idx = (np.concatenate(columns) for columns in zip(*deferred, strict=True))
            self.name_single(rows, block_idx)

    def name_filled(self, rows: Rows, starts: Int64s, stops: Int64s) -> None:
        """Name the blocks that the tokens `starts[i]` to `stops[i] - 1` of each row fill. O(rows + blocks)."""
        self.catch_up()
        table = self._table
        first, last = starts // table.block_size, stops // table.block_size
        filling = (last > first).nonzero()[0]
        filling = filling[table.num_named[rows[filling]] == first[filling]]
        if len(filling) > 1:
            is_single = (last - first)[filling] == 1
            if is_single.any():
                self.name_single(rows[filling[is_single]], first[filling[is_single]])
                filling = filling[~is_single]
        for i in filling.tolist():
            self.name_run(int(rows[i]), int(first[i]), int(last[i]))

    def name_run(self, row: int, first: int, last: int) -> None:
        """Name blocks `first` to `last - 1` of a row whose blocks before them are the named ones. O(blocks)."""
        table = self._table
        block_ids = table.block_tables[row, first:last].astype(np.int64)
        keys = table.content(row).keys(last)[first:last]
        parent_id = int(table.block_tables[row, first - 1]) if first else -1
        try:
            num_named = self._cache.name_chain(keys, block_ids, parent_id)
        except MemoryError:
            return
        if num_named:
            table.num_named[row] = first + num_named
            self._remember(block_ids[:num_named], keys[:num_named])

    def name_single(self, rows: Rows, block_idx: Int64s) -> None:
        """Name block `block_idx[i]` of each row, unless its chain left the named one: the common case of decoding."""
        table = self._table
        is_on_chain = table.num_named[rows] == block_idx
        if not is_on_chain.all():
            rows, block_idx = rows[is_on_chain], block_idx[is_on_chain]
        content = table.content
        keys = [content(row).key(idx) for row, idx in zip(rows.tolist(), block_idx.tolist(), strict=True)]
        block_ids = table.blocks_at(rows, block_idx)
        try:
            is_new = self._cache.name_each(keys, block_ids, self._parents(rows, block_idx))
        except MemoryError:
            return
        table.num_named[rows] += is_new
        if not is_new.all():
            keys = [key for key, new in zip(keys, is_new.tolist(), strict=True) if new]
        self._remember(block_ids[is_new], keys)

    def name_fresh(self, rows: Rows, first: Int64s, counts: Int64s, *, owners: Int64s, block_idx: Int64s) -> None:
        """Name blocks that simulated rows fill as they decode. Such names are new: nobody else has them.

        Row i fills `counts[i]` blocks, from its `first[i]`-th on; the j-th block to be named is block `block_idx[j]` of row
        `rows[owners[j]]`. O(rows + blocks).
        """
        self.catch_up()
        table = self._table
        is_on_chain = table.num_named[rows] == first
        if not is_on_chain.all():
            counts = counts * is_on_chain
            kept = is_on_chain[owners]
            owners, block_idx = owners[kept], block_idx[kept]
        filling = rows[owners]
        block_ids = table.blocks_at(filling, block_idx)
        keys: list[Key] = (table.name_bases[filling] - block_idx).tolist()
        try:
            self._cache.name_fresh(keys, block_ids, self._parents(filling, block_idx))
        except MemoryError:
            return
        table.num_named[rows] += counts
        self._remember(block_ids, keys)

    def _parents(self, rows: Rows, block_idx: Int64s) -> BlockIds:
        """Blocks before these, -1 where there is none; not looked up for a policy that does not ask."""
        if not self._cache.tracks_names:
            return block_idx
        parent_ids = self._table.blocks_at(rows, block_idx - 1)
        parent_ids[block_idx == 0] = -1
        return parent_ids

    def _remember(self, block_ids: BlockIds, keys: Sequence[Key]) -> None:
        if self._named_in_step is not None:
            self._named_in_step.append((block_ids, keys))
