"""What a step of single sequences has appended, so that a step that fails can be taken back."""

from __future__ import annotations

from pagedkv.plans import BlockCopies
from pagedkv.row_memory import RowMemory

__all__ = ["ManagerStep"]


class ManagerStep:
    """Follows the sequences that got slots since the step began: nobody has written these slots until it ends.

    Sequences that fork off one of them share its unwritten slots. What the step named is remembered by the memory.
    """

    __slots__ = ("_copied", "_memory", "_starts")

    def __init__(self, memory: RowMemory) -> None:
        self._memory = memory
        self._starts: dict[int, int] = {}
        """For each row, how many of its tokens were computed before."""
        self._copied: set[int] = set()
        memory.begin_step()

    def __contains__(self, row: int) -> bool:
        """Whether the row has slots that are not written yet. O(1)."""
        return row in self._starts

    def note_append(self, row: int, start: int, copies: BlockCopies) -> None:
        """The row got slots from token `start` on. O(copies)."""
        self._starts.setdefault(row, start)
        self._copied.update(copies.targets.tolist())

    def note_fork(self, row: int, child: int) -> None:
        """`child` now shares all slots of `row`. O(1)."""
        if row in self._starts:
            self._starts[child] = self._starts[row]

    def note_truncation(self, row: int, num_tokens: int) -> None:
        """The row has at most `num_tokens` computed tokens left. O(1)."""
        if row in self._starts:
            self._starts[row] = min(self._starts[row], num_tokens)

    def note_close(self, row: int) -> None:
        """The row was given back; another sequence may get it. O(1)."""
        self._starts.pop(row, None)

    def end(self) -> None:
        """All of it was written. O(1)."""
        self._memory.end_step()

    def take_back(self) -> None:
        """None of it was written: names are forgotten, slots taken back, and the tokens pending again. O(blocks)."""
        memory, table = self._memory, self._memory.sequences
        memory.unname_step()
        for row, start in self._starts.items():
            offset = start % memory.block_size
            # A block that was to be a copy holds nothing of what lies before the new tokens in it, either.
            if offset and int(table.block_tables[row, start // memory.block_size]) in self._copied:
                start -= offset
            memory.retract(row, start)
