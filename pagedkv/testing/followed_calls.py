"""Calls that have succeeded: what they have done is compared with what they had to do, and the model follows."""

from __future__ import annotations

from collections.abc import Hashable

from pagedkv.testing.allocator_model import ModelSequence
from pagedkv.testing.checked_calls import ANYTHING, Call, CheckedCalls, shown, shown_error

__all__ = ["FollowedCalls"]

Pair = tuple[int, int]


class FollowedCalls(CheckedCalls):
    """Hits, tables, copies and slots as the allocator answered them, held against the model."""

    def _on_device(self, sequence_id: Hashable) -> ModelSequence | None:
        sequence = self.model.sequences.get(sequence_id)
        return sequence if sequence is not None and sequence.host_blocks is None else None

    def _check_hit(self, call: Call, num_hit: int, sequence: ModelSequence, expected: list[int]) -> None:
        """A hit is whole blocks, holds the prompt's own content, and is as long as the model says."""
        size, most = self.model.block_size, self.model.longest_hit(sequence.histories)
        if num_hit % size or not 0 <= num_hit <= most:
            self.fail(
                "I3", f"{shown(call)} hit {num_hit} tokens, expected whole blocks of {size}, at most {most} tokens"
            )
        num_written = self.content.num_found(sequence.histories, num_hit)
        if num_written < num_hit:
            self.fail(
                "I3",
                f"{shown(call)} hit {num_hit} tokens, no blocks hold more than {num_written} of them under this salt",
            )
        if self.capabilities.exact_hits and num_hit != len(expected) * size:
            self.fail("I3", f"{shown(call)} hit {num_hit} tokens, expected {len(expected) * size}: blocks {expected}")

    def _adopt(self, sequence_id: Hashable, sequence: ModelSequence, blocks: list[int], num_hit: int) -> None:
        """Enter a sequence whose first tokens were hit; the blocks must hold them."""
        self.model.sequences[sequence_id] = sequence
        self._prompts_given[sequence_id] = self._given
        sequence.blocks, sequence.num_computed = blocks, num_hit
        position = self.content.first_difference(
            blocks[: num_hit // self.model.block_size], sequence.histories, num_hit, on_host=False
        )
        if position is not None:
            self.fail("I3", f"open({sequence_id!r}) hit blocks {blocks}, token {position} there is another's")
        self._count_named(sequence)

    def _count_named(self, sequence: ModelSequence) -> None:
        """Count the leading blocks that are the ones which the prefix cache names."""
        model, size = self.model, self.model.block_size
        sequence.num_named = 0
        for idx in range(sequence.num_computed // size):
            if model.block_of.get(sequence.histories[(idx + 1) * size - 1]) != sequence.blocks[idx]:
                return
            sequence.num_named = idx + 1

    def _follow_append(
        self, sequence_id: Hashable, sequence: ModelSequence, num_tokens: int, appended: tuple[list[int], list[Pair]]
    ) -> None:
        """Compare table, copies and slots with what must be, carry the copies out, and write."""
        model, size = self.model, self.model.block_size
        slots, copies = appended
        start, stop = sequence.num_computed, sequence.num_computed + num_tokens
        old, new = sequence.blocks, self.table(sequence_id)
        num_old = len(old)
        copied = num_tokens > 0 and (model.must_copy(sequence) or (bool(copies) and model.may_copy(sequence)))
        kept = old[:-1] if copied else old
        num_blocks = max(num_old, model.num_blocks_for(stop))
        expected_copies = [(old[-1], new[num_old - 1])] if copied and len(new) >= num_old else []
        if copies != expected_copies or (copied and new[num_old - 1] == old[-1]):
            wanted = f"a copy of block {old[-1]} to a fresh one: it is shared or cached" if copied else "none"
            self.fail(
                "I5", f"append({sequence_id!r}, {num_tokens}) copies {copies} with table {new}, expected {wanted}"
            )
        if new[: len(kept)] != kept or len(new) != num_blocks:
            self.fail(
                "I1",
                f"append({sequence_id!r}, {num_tokens}) turned table {old} into {new}, expected {num_blocks} blocks",
            )
        model.take(new[len(kept) :])
        if copied:
            model.let_go(old[-1:])
        sequence.blocks = new
        self.content.copy(self.content.device, self.content.device, copies)
        expected_slots = [new[i // size] * size + i % size for i in range(start, stop)]
        if slots != expected_slots:
            self.fail(
                "I4", f"append({sequence_id!r}, {num_tokens}) gave slots {slots}, table {new} says {expected_slots}"
            )
        self._write(sequence, start, stop)

    def _write(self, sequence: ModelSequence, start: int, stop: int) -> None:
        """Write tokens through the table, and name the blocks that became full."""
        size, device, histories = self.model.block_size, self.content.device, sequence.histories
        for position in range(start, stop):
            device[sequence.blocks[position // size]][position % size] = histories[position]
        sequence.num_computed = stop
        self.model.name_filled(sequence, start // size)

    def _check_forgotten(self, sequence_id: Hashable) -> None:
        """Nothing of a closed sequence may be left."""
        call = ("block_table", sequence_id)
        try:
            answer = self.allocator.block_table(sequence_id)
        except self.capabilities.mistakes:
            return
        except ANYTHING as error:
            self.fail(
                "I8", f"{shown(call)} raised {shown_error(error)}, expected the refusal of a mistake or no blocks"
            )
        blocks = self.plain(call, answer)
        if blocks:
            self.fail("I10", f"{sequence_id!r} was closed and still has a table: {blocks}")
