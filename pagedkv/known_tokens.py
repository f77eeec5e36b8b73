"""The tokens that rows consist of: those of the block that is being filled in a column, all before them in the rows' contents."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows
from pagedkv.content import Content, TokenContent
from pagedkv.errors import InvalidArgumentError
from pagedkv.sequences import SequenceTable

__all__ = ["KnownTokens"]

NO_TOKENS = np.empty(0, np.int32)


class KnownTokens:
    """Reads and extends the known tokens of rows. A step of many rows writes one token each with one assignment.

    `SequenceTable.tails` has the tokens of the block that holds the last known one. A content gets them when the block is
    full, or when somebody wants to read it: until then its last block may be behind.
    """

    __slots__ = ("_hashes_blocks", "_table")

    def __init__(self, table: SequenceTable, *, hashes_blocks: bool) -> None:
        """`hashes_blocks`: whether blocks get names, so that they are hashed as their tokens are stored."""
        self._table = table
        self._hashes_blocks = hashes_blocks

    # Reading

    def last(self, rows: Rows, positions: Int64s) -> Int32s:
        """The last known token of each row, which stands at `positions[i]`, (n,) int32. O(n)."""
        table = self._table
        last: Int32s = table.tails[rows, positions % table.block_size]
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
        packed[stops[single] - 1] = table.tails[rows[single], starts[single] % table.block_size]
        for i in np.flatnonzero(~single).tolist():
            row, start, stop = int(rows[i]), int(starts[i]), int(starts[i] + num_tokens[i])
            content = self.sync(row)
            if not isinstance(content, TokenContent):
                raise InvalidArgumentError(f"row {row} has a simulated prompt: there are no token ids")
            packed[stops[i] - num_tokens[i] : stops[i]] = content.token_ids(start, stop)
        return packed

    def sync(self, row: int) -> Content:
        """Write the tokens of the last, partly filled block into the row's content; returns that. O(block_size)."""
        table = self._table
        content = table.content(row)
        if isinstance(content, TokenContent):
            num_known = table.num_known.item(row)
            offset = num_known % table.block_size
            if offset:
                content.write(num_known - offset, table.tails[row, :offset])
        return content

    # Writing

    def load_tail(self, row: int, num_known: int) -> None:
        """Copy the tokens of the block that holds token `num_known - 1`, full or not, from the content into the column."""
        table = self._table
        content = table.content(row)
        if isinstance(content, TokenContent):
            start = (num_known - 1) // table.block_size * table.block_size
            table.tails[row, : num_known - start] = content.token_ids(start, num_known)

    def extend(self, rows: Rows, token_ids: Int32s | None) -> None:
        """Append one token to each row; None where only names are simulated. O(n), and hashing of full blocks."""
        table = self._table
        known = table.num_known[rows]
        if token_ids is not None:
            offsets = known % table.block_size
            table.tails[rows, offsets] = token_ids
            filled = (offsets == table.block_size - 1).nonzero()[0]
            if len(filled):
                self._store_blocks(rows[filled], known[filled] // table.block_size)
        table.num_known[rows] = known + 1

    def extend_run(self, row: int, token_ids: Int32s) -> None:
        """As `extend` for many tokens of one row. O(n)."""
        table = self._table
        num_known, num_new = table.num_known.item(row), len(token_ids)
        offset = num_known % table.block_size
        if offset + num_new < table.block_size:
            table.tails[row, offset : offset + num_new] = token_ids
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

    def _store_blocks(self, rows: Rows, block_idx: Int64s) -> None:
        """Write the blocks that the last known tokens fill into the contents of their rows. O(blocks)."""
        table = self._table
        packed = table.tails[rows].tobytes()
        size = len(packed) // len(rows)
        # A row that left the named chain names nothing more, so nothing is hashed for it.
        is_hashed = (table.num_named[rows] == block_idx) & self._hashes_blocks
        first = 0
        for row, idx, hashed in zip(rows.tolist(), block_idx.tolist(), is_hashed.tolist(), strict=True):
            content = table.content(row)
            if isinstance(content, TokenContent):
                content.write_block(idx, packed[first : first + size], is_hashed=hashed)
            first += size
