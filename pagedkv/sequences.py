"""Columns of the live sequences: one row each, in flat arrays, with the block tables as one 2-D array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import BlockIds, Int32s, Int64s, Rows, cdiv, packed_runs
from pagedkv.content import Content, SimulatedContent
from pagedkv.errors import InvariantViolation

__all__ = ["SequenceTable"]


class SequenceTable:
    """A struct of arrays over rows. Rows are dense: one that was given back is used again before the table grows.

    num_known:    (rows,) int64, tokens that the sequence consists of
    num_computed: (rows,) int64, tokens that have a slot: their K/V is computed, or planned in the step in flight
    num_blocks:   (rows,) int64, blocks held on the device
    num_drafts:   (rows,) int64, guessed tokens that have slots behind the computed ones, while their step is in flight
    num_named:    (rows,) int64, leading blocks that are the ones that the prefix cache names
    has_shared_tail: (rows,) bool, the last, partly filled block may have another holder or a name
    block_tables: (rows, width) int32; entries beyond `num_blocks` are never read
    name_bases:   (rows,) int64, where content is simulated: block i that a decode fills is named `name_bases - i`
    tails:        (rows, 2 * block_size) int32, the tokens of the block that holds the last known one, and of the one before
                  it: token i at `i % (2 * block_size)`
    contents:     per row, what the sequence contains

    Both dimensions double when they are exceeded; references to the arrays go stale then, so ask for them anew.
    """

    __slots__ = (
        "_free_rows",
        "block_size",
        "block_tables",
        "contents",
        "has_shared_tail",
        "is_live",
        "name_bases",
        "num_blocks",
        "num_computed",
        "num_drafts",
        "num_known",
        "num_live",
        "num_named",
        "tails",
    )

    def __init__(self, block_size: int, num_rows: int = 64, width: int = 64) -> None:
        self.block_size = block_size
        self.num_live = 0
        self.num_known: Int64s = np.zeros(num_rows, np.int64)
        self.num_computed: Int64s = np.zeros(num_rows, np.int64)
        self.num_blocks: Int64s = np.zeros(num_rows, np.int64)
        self.num_drafts: Int64s = np.zeros(num_rows, np.int64)
        self.num_named: Int64s = np.zeros(num_rows, np.int64)
        self.name_bases: Int64s = np.zeros(num_rows, np.int64)
        self.has_shared_tail: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self.is_live: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self.block_tables: Int32s = np.zeros((num_rows, width), np.int32)
        self.tails: Int32s = np.zeros((num_rows, 2 * block_size), np.int32)
        self.contents: list[Content | None] = [None] * num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))

    def add(self, content: Content, num_known: int, block_ids: BlockIds, num_computed: int) -> int:
        """Make a row for a new sequence and return it. O(len(block_ids)) amortised."""
        if not self._free_rows:
            self._grow_rows()
        num_blocks = len(block_ids)
        self.reserve_width(num_blocks)
        row = self._free_rows.pop()
        self.num_live += 1
        self.is_live[row] = True
        self.contents[row] = content
        if isinstance(content, SimulatedContent):
            self.name_bases[row] = content.base
        self.num_known[row] = num_known
        self.num_computed[row] = num_computed
        self.num_blocks[row] = num_blocks
        self.num_drafts[row] = 0
        self.num_named[row] = 0
        self.has_shared_tail[row] = False
        self.block_tables[row, :num_blocks] = block_ids
        return row

    def remove(self, row: int) -> None:
        """Give the row back. O(1)."""
        self.is_live[row] = False
        self.contents[row] = None
        self.num_blocks[row] = 0
        self._free_rows.append(row)
        self.num_live -= 1

    def content(self, row: int) -> Content:
        """What a live row contains. O(1). Raises InvariantViolation for a row that is not live."""
        content = self.contents[row]
        if content is None:
            raise InvariantViolation("I9", f"row {row} is used after it was given back")
        return content

    def blocks(self, row: int) -> BlockIds:
        """The row's blocks, (num_blocks,) int64, a copy. O(num_blocks)."""
        return self.block_tables[row, : self.num_blocks.item(row)].astype(np.int64)

    def blocks_at(self, rows: Rows, block_idx: Int64s) -> BlockIds:
        """Block `block_idx[i]` of row `rows[i]`, (n,) int64. O(n)."""
        return self.block_tables[rows, block_idx].astype(np.int64)

    def last_blocks(self, rows: Rows, counts: Int64s) -> BlockIds:
        """The last `counts[i]` blocks of row `rows[i]`, row after row, the deepest of each first. O(blocks)."""
        columns = -packed_runs(1 - self.num_blocks[rows], counts)
        return self.blocks_at(rows.repeat(counts), columns)

    def append_blocks(self, rows: Rows, num_new: Int64s, block_ids: BlockIds) -> None:
        """Append `num_new[i]` of the blocks to row `rows[i]`, in order. Rows are distinct. O(len(block_ids)).

        As for every `append_...`, room was reserved before the blocks were taken: once they are, nothing may fail.
        """
        held = self.num_blocks[rows]
        total = held + num_new
        offsets = num_new.cumsum() - num_new
        columns = (held - offsets).repeat(num_new) + np.arange(len(block_ids))
        self.block_tables[rows.repeat(num_new), columns] = block_ids
        self.num_blocks[rows] = total

    def append_single(self, rows: Rows, block_ids: BlockIds) -> None:
        """Append one block to each row. O(n)."""
        held = self.num_blocks[rows]
        self.block_tables[rows, held] = block_ids
        self.num_blocks[rows] = held + 1

    def reserve_width(self, num_blocks: int) -> None:
        """Make room for tables of `num_blocks` blocks. O(1) amortised."""
        if num_blocks > self.block_tables.shape[1]:
            self._grow_width(num_blocks)

    def append_run(self, row: int, held: int, block_ids: BlockIds) -> None:
        """Append blocks to one row that holds `held`. O(n)."""
        total = held + len(block_ids)
        self.block_tables[row, held:total] = block_ids
        self.num_blocks[row] = total

    def num_blocks_to_append(self, rows: Rows, num_tokens: Int64s | int) -> Int64s:
        """Blocks that each row takes for so many tokens more, copies on write not counted, (n,) int64. O(n)."""
        stops = self.num_computed[rows] + num_tokens
        return -(-stops // self.block_size) - self.num_blocks[rows]

    def slots(self, rows: Rows, positions: Int64s) -> Int64s:
        """Slot of token `positions[i]` of row `rows[i]`: block_id * block_size + offset, (n,) int64. O(n)."""
        block_size = self.block_size
        block_idx = positions // block_size
        # In place on one array: a step asks for this while little of what it touches is in the processor's caches.
        slots: Int64s = self.block_tables[rows, block_idx] - block_idx
        slots *= block_size
        slots += positions
        return slots

    def slots_of_run(self, row: int, start: int, stop: int) -> Int64s:
        """Slots of tokens `start` to `stop - 1` of one row, (stop - start,) int64. O(n)."""
        block_size = self.block_size
        first = start // block_size
        if (stop - 1) // block_size == first:  # Mostly one token.
            slot = self.block_tables.item(row, first) * block_size + start - first * block_size
            return np.arange(slot, slot + stop - start)
        firsts = self.block_tables[row, first : cdiv(stop, block_size)].astype(np.int64) * block_size
        slots: Int64s = (firsts[:, None] + np.arange(block_size)).ravel()
        return slots[start - first * block_size : stop - first * block_size]

    def _grow_rows(self) -> None:
        old, new = len(self.contents), 2 * len(self.contents)
        for name in (
            "num_known",
            "num_computed",
            "num_blocks",
            "num_drafts",
            "num_named",
            "name_bases",
            "has_shared_tail",
            "is_live",
        ):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(new - old, column.dtype))))
        for name in ("block_tables", "tails"):
            table = getattr(self, name)
            setattr(self, name, np.concatenate((table, np.zeros((new - old, table.shape[1]), table.dtype))))
        self.contents.extend([None] * (new - old))
        self._free_rows = list(range(new - 1, old - 1, -1))

    def _grow_width(self, width: int) -> None:
        old = self.block_tables
        new_width = max(width, 2 * old.shape[1])
        self.block_tables = np.zeros((old.shape[0], new_width), np.int32)
        self.block_tables[:, : old.shape[1]] = old
