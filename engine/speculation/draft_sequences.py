"""What a drafter's own model knows of the samples: their tokens, and which of them have K/V in its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32s, Int64s, Rows, as_token_ids, cdiv
from pagedkv.content import TokenContent
from pagedkv.engine.speculation.drafter import SampleKey
from pagedkv.errors import InvalidArgumentError, InvariantViolation, UnknownIdError
from pagedkv.manager import KVCacheManager

__all__ = ["CatchUp", "DraftSequence", "DraftSequences"]

NO_ROW = -1


class DraftSequence:
    """One sample.

    content:   its tokens, up to date while it has no row
    num_known: how many they are
    row:       its row in the memory; NO_ROW while nothing of it is held there
    drafts:    what was guessed to follow the known tokens; None once more tokens are known. All of these drafts but the
               last have K/V behind that of the known tokens
    """

    __slots__ = ("content", "drafts", "num_known", "row")

    def __init__(self, content: TokenContent, num_known: int) -> None:
        self.content = content
        self.num_known = num_known
        self.row = NO_ROW
        self.drafts: Int32s | None = None


class CatchUp(NamedTuple):
    """Rows that are to be guessed for: `num_tokens[i]` known tokens of row i from `starts[i]` on have no K/V yet, at least one.

    rows, starts, num_tokens: (n,) int64
    num_drafts:               (n,) int64, how many to guess; all but the last of them have slots
    """

    rows: Rows
    starts: Int64s
    num_tokens: Int64s
    num_drafts: Int64s


class DraftSequences:
    """The samples of a drafter by key, in a memory of their own.

    A sample takes a row when it is first guessed for. Guesses lie in draft slots behind its known tokens: they have no
    name, and of those that come true, the K/V is kept. If the memory is short, samples that are not guessed for now give
    way first, then whoever does not fit; both begin anew once there is room, from what the prefix cache still has.
    Nothing is forked or truncated here, so that no write needs a copy.
    """

    __slots__ = ("_max_length", "_memory", "_sequences", "_taken", "manager")

    def __init__(self, manager: KVCacheManager, max_length: int | None) -> None:
        """`max_length` is how many positions the drafter's model knows; None: no limit."""
        self.manager = manager
        self._memory = manager.memory
        self._max_length = max_length
        self._sequences: dict[SampleKey, DraftSequence] = {}
        self._taken: list[DraftSequence] = []
        """Samples of the step under way."""

    # Samples

    def begin(self, key: SampleKey, token_ids: Sequence[int] | Int32s, salt: bytes) -> None:
        """Remember a sample's tokens; a live key starts over. O(tokens + blocks). Raises InvalidArgumentError."""
        content, num_known = self.manager.make_content(as_token_ids("token_ids", token_ids), salt=salt)
        if not isinstance(content, TokenContent):
            raise InvalidArgumentError("only real tokens can be guessed, found a simulated prompt")
        self.end(key)
        self._sequences[key] = DraftSequence(content, num_known)

    def end(self, key: SampleKey) -> None:
        """Forget a sample; its named blocks stay in the cache. O(blocks)."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._let_go(sequence)

    def extend(self, key: SampleKey, token_ids: Sequence[int] | Int32s) -> None:
        """A sample got tokens: keep the K/V of guesses that they confirm, and drop the others'. O(tokens + blocks dropped)."""
        sequence = self.get(key)
        tokens = as_token_ids("token_ids", token_ids)
        if not len(tokens):
            return
        if sequence.row == NO_ROW:
            sequence.content.write(sequence.num_known, tokens)
        else:
            rows = np.array([sequence.row])
            for place in range(len(tokens)):
                self._memory.tokens.extend(rows, tokens[place : place + 1])
            if sequence.drafts is not None:
                self._memory.drafts.settle(rows, np.array([_num_confirmed(sequence.drafts, tokens)]))
        sequence.num_known += len(tokens)
        sequence.drafts = None

    def get(self, key: SampleKey) -> DraftSequence:
        """A live sample. O(1). Raises UnknownIdError."""
        try:
            return self._sequences[key]
        except KeyError:
            raise UnknownIdError(f"no sample {key!r} was begun") from None

    # Guessing

    def begin_step(self, keys: Sequence[SampleKey], num_drafts: Sequence[int]) -> CatchUp:
        """Take slots for the known tokens and the guesses of those samples that fit, in this order; return what to compute.

        A sample whose guesses still stand, or that is to get none, is left out. Compute all of it, every token before one
        that is behind it here, then call `end_step`, or `fail_step`. O(samples + tokens).
        """
        self._memory.begin_step()
        self._taken.clear()
        wanted = {key for key, count in zip(keys, num_drafts, strict=True) if count}
        idle = [other for key, other in self._sequences.items() if other.row != NO_ROW and key not in wanted]
        work: list[tuple[int, int, int, int]] = []
        for key, count in zip(keys, num_drafts, strict=True):
            sequence = self._sequences[key]
            if key not in wanted or sequence.drafts is not None:
                continue
            count = self._num_possible(sequence, count)
            if not count or not self._try_open(sequence, count, idle):
                self._let_go(sequence)
                continue
            self._taken.append(sequence)
            work.append(self._append(sequence, count))
        columns = np.array(work, np.int64).reshape(-1, 4)
        return CatchUp(*columns.T)

    def end_step(self, drafts: list[Int32s]) -> None:
        """The step was carried out; these are the guesses, for each row of it. O(samples)."""
        self._memory.end_step()
        for sequence, tokens in zip(self._taken, drafts, strict=True):
            sequence.drafts = tokens
        self._taken.clear()

    def fail_step(self) -> None:
        """The step was not carried out: its samples begin anew when they are guessed for again. O(samples + blocks)."""
        self._memory.unname_step()
        for sequence in self._taken:
            self._let_go(sequence)
        self._taken.clear()

    def _num_possible(self, sequence: DraftSequence, num_drafts: int) -> int:
        """How many drafts the model has positions for, 0 if the memory could not hold them were it empty."""
        if self._max_length is not None:
            num_drafts = min(num_drafts, max(0, self._max_length - sequence.num_known + 1))
        num_blocks = cdiv(sequence.num_known + num_drafts - 1, self._memory.block_size)
        return num_drafts if num_blocks <= self._memory.pool.num_blocks else 0

    def _try_open(self, sequence: DraftSequence, num_drafts: int, idle: list[DraftSequence]) -> bool:
        """Make sure that it has a row and that there are blocks to append to it; the `idle` give way for that."""
        memory = self._memory
        if sequence.row == NO_ROW:
            content, num_known = sequence.content, sequence.num_known
            hit_blocks = memory.hit_blocks(content, memory.num_hit_blocks(content, num_known))
            sequence.row = memory.open(content, num_known, hit_blocks)
        table = memory.sequences
        length = sequence.num_known + num_drafts - 1
        num_needed = cdiv(length, memory.block_size) - int(table.num_blocks[sequence.row])
        while num_needed > memory.pool.num_available and idle:
            self._let_go(idle.pop())
        return num_needed <= memory.pool.num_available

    def _append(self, sequence: DraftSequence, num_drafts: int) -> tuple[int, int, int, int]:
        """Give the known tokens and the drafts but the last their slots, for which there are blocks."""
        memory, row = self._memory, sequence.row
        start = int(memory.sequences.num_computed[row])
        num_tokens = sequence.num_known - start
        has_appended = memory.try_append_run(row, num_tokens) is not None
        if not has_appended or not memory.drafts.try_give(np.array([row]), np.array([num_drafts - 1])):
            raise InvariantViolation("I1", f"{memory.pool.num_available} blocks were there, and could not be had")
        return row, start, num_tokens, num_drafts

    def _let_go(self, sequence: DraftSequence) -> None:
        """Give back all that is held for it; its tokens stay. O(blocks)."""
        if sequence.row != NO_ROW:
            self._memory.close(sequence.row)
        sequence.row = NO_ROW
        sequence.drafts = None


def _num_confirmed(drafts: Int32s, token_ids: Int32s) -> int:
    """How many of the drafts with K/V came true. The last token is never counted: its logits are still to be computed."""
    num_compared = max(0, min(len(drafts), len(token_ids)) - 1)
    wrong = (drafts[:num_compared] != token_ids[:num_compared]).nonzero()[0]
    return int(wrong[0]) if len(wrong) else num_compared
