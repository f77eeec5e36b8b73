"""One allocator and its model, side by side: every verb is carried out on both, and what they say is compared.

A trial's verbs take any arguments: from its model the trial knows beforehand whether a call must succeed, must run short of
blocks, or must be refused, and demands just that. So any list of calls is a test, and any part of such a list is one, too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from pagedkv.errors import InvalidArgumentError
from pagedkv.testing.allocator_model import ModelSequence
from pagedkv.testing.checked_calls import FRESH_TOKEN, Call
from pagedkv.testing.followed_calls import FollowedCalls

__all__ = ["AllocatorTrial"]

VERBS = ("open", "extend", "append", "fork", "truncate", "close", "swap_out", "swap_in", "lookup", "finish")


class AllocatorTrial(FollowedCalls):
    """Calls verbs, compares results with the model's, and raises InvariantViolation naming what was broken.

    `check_every`: after how many calls every table is recounted; `read_every`: after how many the content of every live
    sequence is read back. Results, block choices and the number of free blocks are compared after each call.
    That a refused call has changed nothing else is looked at where a recount is due.
    `log` keeps every result, so that two runs can be compared (I14).
    """

    # Opening and closing

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], salt: bytes = b"") -> None:
        """Open a sequence; the hit must be the one that the model predicts, and its blocks must hold the prompt."""
        model, caps = self.model, self.capabilities
        call, salt = ("open", sequence_id, list(token_ids)), self._known_salt(salt)
        self.calls.append((*call, salt))
        if sequence_id in model.sequences or not token_ids:
            self.refuse(call, salt=salt)
            return
        sequence = self._new_sequence(token_ids, salt)
        expected = model.resident(sequence.histories, model.longest_hit(sequence.histories))
        if not caps.chunked_prefill:
            self._open_whole(call, sequence, salt)
            return
        num_hit = self.succeed(call, salt=salt)
        self._check_hit((*call, salt), num_hit, sequence, expected)
        blocks = self.table(sequence_id)
        if caps.exact_hits and blocks != expected:
            self.fail("I3", f"open({sequence_id!r}) holds blocks {blocks}, expected {expected}, which have its content")
        if len(blocks) * model.block_size != num_hit:
            self.fail("I1", f"open({sequence_id!r}) hit {num_hit} tokens and holds blocks {blocks}")
        model.hold(blocks)
        self._adopt(sequence_id, sequence, blocks, num_hit)
        self.count(("open", num_hit, tuple(blocks)))

    def close(self, sequence_id: Hashable) -> None:
        """Close a sequence; its blocks must be available again, those with names still hit."""
        self.calls.append(("close", sequence_id))
        model = self.model
        if sequence_id not in model.sequences:
            if self.capabilities.checks_ids or sequence_id in self.closed_ids:
                self.refuse(("close", sequence_id), invariant="I9")
            return
        self.succeed(("close", sequence_id))
        sequence = model.sequences.pop(sequence_id)
        model.let_go(sequence.blocks)
        model.host_held -= set(sequence.host_blocks or ())
        self.closed_ids.add(sequence_id)
        self._check_forgotten(sequence_id)
        given = self._prompts_given.pop(sequence_id, None)
        if given is not None:
            self.check_given(*given)
        self.count(("close",))

    def lookup(self, token_ids: Sequence[int], salt: bytes = b"") -> None:
        """Ask for the longest hit, which must change nothing."""
        call, salt = ("lookup", list(token_ids)), self._known_salt(salt)
        self.calls.append((*call, salt))
        if not self.capabilities.prefix_caching or not token_ids:
            return
        sequence = self._new_sequence(token_ids, salt)
        before = self.snapshot()
        num_hit = self.succeed(call, salt=salt)
        self.unchanged(before, "I8", call, "returned")
        expected = self.model.resident(sequence.histories, self.model.longest_hit(sequence.histories))
        self._check_hit((*call, salt), num_hit, sequence, expected)
        self.count(("lookup", num_hit))

    # Growing, sharing, shrinking

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """Make more tokens known."""
        call = ("extend", sequence_id, list(token_ids))
        self.calls.append(call)
        sequence = self.model.sequences.get(sequence_id)
        if sequence is None:
            self.refuse(call)
            return
        self.succeed(call)
        last = sequence.histories[-1]
        sequence.tokens += token_ids
        sequence.histories += self.histories.walk(last, token_ids)
        self.count(("extend",), sequence_id)

    def append(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Give known tokens slots: as many copies as needed and no more, growth by free blocks, success at an exact fit."""
        self.calls.append(("append", sequence_id, num_tokens))
        model, sequence = self.model, self._on_device(sequence_id)
        call = ("append", sequence_id, num_tokens)
        if sequence is None or not 0 <= num_tokens <= sequence.num_pending:
            self.refuse(call)
            return
        if not self.capabilities.chunked_prefill and num_tokens != 1:
            return
        num_needed = model.num_needed(sequence, num_tokens)
        if num_needed > model.num_free:
            self.run_short(call, num_needed, if_granted="I5" if model.must_copy(sequence) else "I1")
            return
        num_most = num_needed
        if model.once_full and num_tokens > 0:
            num_most += model.may_copy(sequence) and not model.must_copy(sequence)
        appended = self.succeed(call) if num_most <= model.num_free else self.succeed_or_run_short(call)
        if appended is None:
            return
        slots, copies = appended
        self._follow_append(sequence_id, sequence, num_tokens, (slots, copies))
        self.count(("append", tuple(slots), tuple(copies)))

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        """Share every block of a sequence."""
        self.calls.append(("fork", source_id, sequence_id))
        if not self.capabilities.forking:
            return
        model, source = self.model, self._on_device(source_id)
        if source is None or sequence_id in model.sequences:
            self.refuse(("fork", source_id, sequence_id))
            return
        self.succeed(("fork", source_id, sequence_id))
        child = ModelSequence(source.salt, source.tokens[:], source.histories[:])
        child.num_computed, child.num_named, child.blocks = source.num_computed, source.num_named, source.blocks[:]
        child.was_swapped = source.was_swapped
        model.hold(child.blocks)
        model.sequences[sequence_id] = child
        self.count(("fork",), sequence_id)

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Drop the last tokens and the blocks that only they needed."""
        self.calls.append(("truncate", sequence_id, num_tokens))
        if not self.capabilities.truncating:
            return
        model, sequence = self.model, self._on_device(sequence_id)
        if sequence is None or not 1 <= num_tokens <= len(sequence.histories):
            self.refuse(("truncate", sequence_id, num_tokens))
            return
        self.succeed(("truncate", sequence_id, num_tokens))
        del sequence.tokens[num_tokens:], sequence.histories[num_tokens:]
        if num_tokens < sequence.num_computed:
            num_kept = model.num_blocks_for(num_tokens)
            model.let_go(sequence.blocks[num_kept:])
            del sequence.blocks[num_kept:]
            sequence.num_computed = num_tokens
            sequence.num_named = min(sequence.num_named, num_tokens // model.block_size)
        self.count(("truncate",), sequence_id)

    # Swapping

    def swap_out(self, sequence_id: Hashable) -> None:
        """Move a sequence to the host: each of its blocks to a free host block."""
        self.calls.append(("swap_out", sequence_id))
        if not self.capabilities.swapping:
            return
        model, sequence = self.model, self._on_device(sequence_id)
        if sequence is None:
            self.refuse(("swap_out", sequence_id))
            return
        if len(sequence.blocks) > model.num_free_host:
            self.run_short(("swap_out", sequence_id), len(sequence.blocks), invariant="I6")
            return
        copies = self.succeed(("swap_out", sequence_id))
        target_of: dict[int, int] = dict(copies)
        targets = set(target_of.values())
        if sorted(source for source, _ in copies) != sorted(sequence.blocks) or len(targets) != len(copies):
            self.fail(
                "I6", f"swap_out({sequence_id!r}) copies {copies}, expected each of blocks {sequence.blocks} once"
            )
        if not targets <= set(range(model.num_host_blocks)) - model.host_held:
            self.fail("I6", f"swap_out({sequence_id!r}) copies {copies} to host blocks that are held or do not exist")
        self.content.copy(self.content.device, self.content.host, copies)
        sequence.host_blocks = [target_of[block_id] for block_id in sequence.blocks]
        model.host_held |= targets
        model.let_go(sequence.blocks)
        sequence.blocks, sequence.num_named, sequence.was_swapped = [], 0, True
        self.count(("swap_out", tuple(copies)), sequence_id)

    def swap_in(self, sequence_id: Hashable) -> None:
        """Bring a sequence back: blocks that are still cached are taken, and only the others are copied."""
        call = ("swap_in", sequence_id)
        self.calls.append(call)
        if not self.capabilities.swapping:
            return
        model, sequence = self.model, self.model.sequences.get(sequence_id)
        if sequence is None or sequence.host_blocks is None:
            self.refuse(call)
            return
        num_blocks = num_most = len(sequence.host_blocks)
        hits = model.resident(sequence.histories, sequence.num_computed)
        if self.capabilities.exact_hits:
            num_least = num_most = num_blocks - len(hits) + sum(block_id in model.evictable for block_id in hits)
        elif self.capabilities.prefix_caching:
            num_least = (
                num_blocks - self.content.num_found(sequence.histories, sequence.num_computed) // model.block_size
            )
        else:
            num_least = num_blocks
        if num_least > model.num_free:
            self.run_short(call, num_least, invariant="I6")
            return
        copies = (self.succeed if num_most <= model.num_free else self.succeed_or_run_short)(call)
        if copies is None:
            return
        blocks = self.table(sequence_id)
        if len(set(blocks)) < len(blocks):
            self.fail(
                "I7",
                f"swap_in({sequence_id!r}) returned table {blocks}: a block that was found cached was evicted first",
            )
        if self.capabilities.exact_hits:
            expected = list(zip(sequence.host_blocks[len(hits) :], blocks[len(hits) :], strict=False))
            if blocks[: len(hits)] != hits or sorted(copies) != sorted(expected) or len(blocks) != num_blocks:
                self.fail(
                    "I6",
                    f"swap_in({sequence_id!r}) copies {copies} into table {blocks}; expected {num_blocks} blocks, first {hits}, "
                    f"which are still cached, and copies from host blocks {sequence.host_blocks[len(hits) :]} to the others",
                )
        copied = {target for _, target in copies}
        sources = {source for source, _ in copies}
        if len(blocks) != num_blocks or not sources <= set(sequence.host_blocks) or not copied <= set(blocks):
            self.fail(
                "I6",
                f"swap_in({sequence_id!r}) copies {copies} into table {blocks}; expected {num_blocks} blocks, "
                f"and copies from host blocks {sequence.host_blocks} to some of them",
            )
        kept = [block_id for block_id in blocks if block_id not in copied]
        model.hold(kept)
        model.take([block_id for block_id in blocks if block_id in copied])
        self.content.copy(self.content.host, self.content.device, copies)
        model.host_held -= set(sequence.host_blocks)
        sequence.host_blocks, sequence.blocks = None, blocks
        self._count_named(sequence)
        model.name_filled(sequence, sequence.num_named)
        self.count(("swap_in", tuple(copies), tuple(blocks)))

    # Many calls

    def run(self, operation: tuple[Any, ...]) -> None:
        """Carry out a call that is given as a tuple: the verb's name, then its arguments."""
        verb, *arguments = operation
        if verb not in VERBS:
            raise InvalidArgumentError(f"{verb!r} is no verb of a trial: these are {', '.join(VERBS)}")
        getattr(self, verb)(*arguments)

    def fresh(self) -> AllocatorTrial:
        """A trial of the same sizes on a fresh allocator."""
        model = self.model
        return AllocatorTrial(self.make_allocator, model.num_blocks, model.block_size, model.num_host_blocks)

    def repeat(self) -> None:
        """Make the same calls on a fresh allocator; all results must be the same (I14)."""
        again = self.fresh()
        for call in self.calls:
            again.run(call)
        self.compare(again)

    def compare(self, other: AllocatorTrial) -> None:
        """Two trials of the same calls must have had the same results (I14)."""
        for idx, (mine, others) in enumerate(zip(self.log, other.log, strict=False)):
            if mine != others:
                self.fail("I14", f"call {idx} of two equal runs gave {mine} and {others}")
        if len(self.log) != len(other.log):
            self.fail("I14", f"two equal runs made {len(self.log)} and {len(other.log)} calls")

    def finish(self) -> None:
        """Close everything: nothing may be left, and one sequence must be able to take the whole pool (I10)."""
        model = self.model
        for sequence_id in list(model.sequences):
            self.close(sequence_id)
        num_tokens = model.num_blocks * model.block_size
        self.open("the whole pool", [FRESH_TOKEN + self.num_calls] * num_tokens)
        if self.capabilities.chunked_prefill:
            self.append("the whole pool", num_tokens)
        self.close("the whole pool")

    # What the verbs have in common

    def _known_salt(self, salt: bytes) -> bytes:
        """The salt, or none for an allocator that does not say what it does with one."""
        return salt if self.capabilities.salts else b""

    def _new_sequence(self, token_ids: Sequence[int], salt: bytes) -> ModelSequence:
        return ModelSequence(salt, list(token_ids), self.histories.walk(self.histories.root(salt), token_ids))

    def _open_whole(self, call: Call, sequence: ModelSequence, salt: bytes) -> None:
        """Open a sequence that takes all blocks of its prompt at once; hits may spare it some of them."""
        model, size = self.model, self.model.block_size
        num_tokens = len(sequence.histories)
        num_most = model.num_blocks_for(num_tokens)
        num_least = num_most - self.content.num_found(sequence.histories, model.longest_hit(sequence.histories)) // size
        if num_least > model.num_free:
            self.run_short(call, num_least, salt=salt)
            return
        # Between the two, whether it must succeed depends on hits that only the allocator knows.
        num_hit = (self.succeed if num_most <= model.num_free else self.succeed_or_run_short)(call, salt=salt)
        if num_hit is None:
            return
        self._check_hit((*call, salt), num_hit, sequence, model.resident(sequence.histories, min(num_hit, num_tokens)))
        blocks = self.table(call[1])
        if len(blocks) != num_most:
            self.fail("I1", f"open({call[1]!r}) holds blocks {blocks}, expected {num_most} of them")
        num_kept = num_hit // size
        model.hold(blocks[:num_kept])
        model.take(blocks[num_kept:])
        self._adopt(call[1], sequence, blocks, num_hit)
        self._write(sequence, num_hit, num_tokens)
        self.count(("open", num_hit, tuple(blocks)))
