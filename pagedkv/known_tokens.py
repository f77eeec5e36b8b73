"""The tokens that rows consist of: those of the last two blocks in a column, all before them in the rows' contents."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows
from pagedkv.content import Content, TokenContent
from pagedkv.errors import InvalidArgumentError
from pagedkv.sequences import SequenceTable

__all__ = ["KnownTokens"]

NO_TOKENS = np.empty(0, np.int32)
MOST_DEFERRED = 8
"""Steps whose full blocks are stored in one go."""


class KnownTokens:
    """Reads and extends the known tokens of rows. A step of many rows writes one token each with one assignment.

    `SequenceTable.tails` has the tokens of the block that holds the last known one, and of the one before it. Contents get
    full blocks a few steps later, those of all rows together (`store_filled`), or when somebody wants to read one: to
    store a block is cheap, but in every step code and data for it would have to come from memory anew.
    """

    __slots__ = ("_age", "_filled", "_most_deferred", "_table")

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        # Blocks that are full and not stored, as rows and block indices, one pair of arrays a step, and for how many steps
        # that has been so. A row fills its next block only when all these are stored.
        self._filled: list[tuple[Rows, Int64s]] = []
        self._age = 0
        self._most_deferred = min(MOST_DEFERRED, table.block_size)

    # Reading

    def last(self, rows: Rows, positions: Int64s) -> Int32s:
        """The last known token of each row, which stands at `positions[i]`, (n,) int32. O(n)."""
        table = self._table
        last: Int32s = table.tails[rows, positions % (2 * table.block_size)]
        return last

    def packed(self, rows: Rows, starts: Int64s, num_tokens: Int64s) -> Int32s:
        """Known tokens `starts[i]` to `starts[i] + num_tokens[i] - 1` of each row, packed. O(tokens).

        Raises InvalidArgumentError for a row whose tokens are simulated.
        """
        table = self._table
        packed = np.empty(int(np.add.reduce(num_tokens)), np.int32)
        is_tail = starts + num_tokens == table.num_known[rows]
        if len(packed) == len(rows) and is_tail.all():
            return self.last(rows, starts)
        stops = np.cumsum(num_tokens)
        single = (num_tokens == 1) & is_tail
        packed[stops[single] - 1] = self.last(rows[single], starts[single])
        for i in np.flatnonzero(~single).tolist():
            row, start, stop = int(rows[i]), int(starts[i]), int(starts[i] + num_tokens[i])
            content = self.sync(row)
            if not isinstance(content, TokenContent):
                raise InvalidArgumentError(f"row {row} has a simulated prompt: there are no token ids")
            packed[stops[i] - num_tokens[i] : stops[i]] = content.token_ids(start, stop)
        return packed

    def sync(self, row: int) -> Content:
        """Write all known tokens into the row's content; returns that. O(block_size + blocks to store)."""
        self.store_filled()
        table = self._table
        content = table.content(row)
        if isinstance(content, TokenContent):
            num_known = table.num_known.item(row)
            offset = num_known % table.block_size
            if offset:
                place = (num_known - offset) % (2 * table.block_size)
                content.write(num_known - offset, table.tails[row, place : place + offset])
        return content

    # Writing

    def load_tail(self, row: int, num_known: int) -> None:
        """Copy the tokens of the block that holds token `num_known - 1`, full or not, from the content into the column."""
        table = self._table
        content = table.content(row)
        if isinstance(content, TokenContent):
            start = (num_known - 1) // table.block_size * table.block_size
            place = start % (2 * table.block_size)
            table.tails[row, place : place + num_known - start] = content.token_ids(start, num_known)

    def extend(self, rows: Rows, token_ids: Int32s | None) -> None:
        """Append one token to each row; None where only names are simulated. O(n)."""
        table = self._table
        known = table.num_known[rows]
        if token_ids is not None:
            block_size = table.block_size
            places = known % (2 * block_size)
            table.tails[rows, places] = token_ids
            filled = (places % block_size == block_size - 1).nonzero()[0]
            if len(filled):
                self._filled.append((rows[filled], known[filled] // block_size))
        table.num_known[rows] = known + 1
        if self._filled:
            self._age += 1
            if self._age >= self._most_deferred:
                self.store_filled()

    def extend_run(self, row: int, token_ids: Int32s) -> None:
        """As `extend` for many tokens of one row. O(n + blocks to store)."""
        self.store_filled()
        table = self._table
        num_known, num_new = table.num_known.item(row), len(token_ids)
        place = num_known % (2 * table.block_size)
        if place % table.block_size + num_new < table.block_size:
            table.tails[row, place : place + num_new] = token_ids
        else:
            content = self.sync(row)
            if isinstance(content, TokenContent):
                content.write(num_known, token_ids)
                self.load_tail(row, num_known + num_new)
        table.num_known[row] = num_known + num_new

    def cut(self, row: int, num_tokens: int) -> None:
        """Forget the tokens from `num_tokens` on. O(block_size)."""
        content = self.sync(row)
        if isinstance(content, TokenContent):
            content.write(num_tokens, NO_TOKENS)
            self.load_tail(row, num_tokens)
        self._table.num_known[row] = num_tokens

    def store_filled(self) -> None:
        """Write all blocks that are full and not stored into the contents of their rows. O(blocks), O(1) if there are none."""
        if not self._filled:
            return
        rows, block_idx = (np.concatenate(columns) for columns in zip(*self._filled, strict=True))
        table = self._table
        # A tail is two blocks: the even one, then the odd one.
        packed = table.tails.reshape(-1, table.block_size)[2 * rows + block_idx % 2].tobytes()
        size = len(packed) // len(rows)
        first = 0
        for row, idx in zip(rows.tolist(), block_idx.tolist(), strict=True):
            content = table.content(row)
            if isinstance(content, TokenContent):
                content.write_block(idx, packed[first : first + size])
            first += size
        self._filled, self._age = [], 0
