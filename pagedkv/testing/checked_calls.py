"""Calls of an allocator's verbs that must succeed, run short, or be refused, and the recounts after them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NoReturn

from pagedkv.errors import ConfigError, InvariantViolation
from pagedkv.testing.allocator_model import AllocatorModel, ModelSequence
from pagedkv.testing.allocator_protocol import AllocatorProtocol, Capabilities, MakeAllocator
from pagedkv.testing.answers import EXPECTED, READERS
from pagedkv.testing.content_shadow import ContentShadow, Histories

__all__ = ["ANYTHING", "FRESH_TOKEN", "Call", "CheckedCalls", "shown", "shown_error"]

Call = tuple[Any, ...]
"""A verb's name and its arguments."""
OWN_CHECK_EVERY = 16
"""One recount in so many is followed by the allocator's own, which may cost more than all else together."""
FRESH_TOKEN = 2**30
"""No prompt of a test contains this token or one of the next 2^30 - 1."""
ANYTHING = (Exception, SystemExit)
"""What an allocator under test may raise; ctrl-C is the user's own."""
MOST_SHOWN = 80
"""Characters of a wrong answer that a message shows."""


class CheckedCalls:
    """An allocator, the model of it and the content of its blocks; every way in which a call may end is looked at."""

    def __init__(
        self,
        make_allocator: MakeAllocator,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        *,
        check_every: int = 1,
        read_every: int = 1,
    ) -> None:
        self.make_allocator = make_allocator
        try:
            self.allocator: AllocatorProtocol = make_allocator(num_blocks, block_size, num_host_blocks)
            capabilities = getattr(self.allocator, "capabilities", None)
        except ANYTHING as error:
            name = getattr(make_allocator, "__qualname__", type(make_allocator).__name__)
            raise ConfigError(
                f"{name}({num_blocks=}, {block_size=}, {num_host_blocks=}) raised {shown_error(error)}: expected an allocator"
            ) from error
        self.capabilities = checked_capabilities(self.allocator, capabilities)
        if not self.capabilities.swapping:
            num_host_blocks = 0
        self.model = AllocatorModel(num_blocks, block_size, num_host_blocks, self.capabilities)
        self.content = ContentShadow(num_blocks, block_size, num_host_blocks)
        self.histories = Histories()
        self.check_every = check_every
        self.read_every = read_every
        self.num_calls = 0
        self.log: list[object] = []
        self.calls: list[Call] = []
        self.closed_ids: set[Hashable] = set()
        # The last list of tokens that was handed over, and those that open sequences began with: they stay the caller's.
        self._given: tuple[Call, list[Any]] | None = None
        self._prompts_given: dict[Hashable, tuple[Call, list[Any]] | None] = {}
        self._own_check = getattr(self.allocator, "check", None)
        self._shows_state = hasattr(self.allocator, "state")

    # How a call ends

    def make(self, call: Call, options: dict[str, Any]) -> Any:
        """Make a call with a list of its own, so that the trial's lists are out of the allocator's reach."""
        verb, tokens = getattr(self.allocator, call[0]), call[-1]
        if type(tokens) is not list:
            return verb(*call[1:], **options)
        given = tokens[:]
        self._given = (call, given)
        return verb(*call[1:-1], given, **options)

    def succeed(self, call: Call, **options: object) -> Any:
        """Make a call that must succeed, and return its result."""
        try:
            answer = self.make(call, options)
        except self.capabilities.shortage as error:
            self.fail(
                "I2",
                f"{shown(call)} raised {shown_error(error)} with {self.model.num_free} blocks free: expected success",
            )
        except self.capabilities.mistakes as error:
            is_left = call[0] in ("open", "fork") and call[{"open": 1, "fork": 2}[call[0]]] in self.closed_ids
            reason = ", which was closed before," if is_left else ""
            self.fail(
                "I10" if is_left else "I8", f"{shown(call)}{reason} raised {shown_error(error)}: expected success"
            )
        except ANYTHING as error:
            self.fail("I8", f"{shown(call)} raised {shown_error(error)}: expected success")
        return self.plain(call, answer) if call[0] in READERS else answer

    def succeed_or_run_short(self, call: Call, **options: object) -> Any:
        """Make a call of which only the allocator knows whether it has the blocks; return its result, None if it has not."""
        before = self.snapshot()
        try:
            answer = self.make(call, options)
        except self.capabilities.shortage:
            self.unchanged(before, "I8", call, "ran short of blocks")
            self.count((call[0], "short"))
            return None
        except ANYTHING as error:
            self.fail("I8", f"{shown(call)} raised {shown_error(error)}, expected success or a shortage")
        return self.plain(call, answer)

    def ask(self, verb: str, *arguments: Hashable) -> Any:
        """Ask something that must be answered between any two calls, and return the answer."""
        try:
            answer = getattr(self.allocator, verb)(*arguments)
        except ANYTHING as error:
            self.fail("I8", f"{shown((verb, *arguments))} raised {shown_error(error)}: expected an answer")
        try:
            return READERS[verb](answer)
        except ANYTHING:
            self.fail_answer((verb, *arguments), answer)

    def plain(self, call: Call, answer: Any) -> Any:
        """An answer in plain integers; one of a wrong kind is a failure of the allocator, not of the trial."""
        try:
            return READERS[call[0]](answer)
        except ANYTHING:
            self.fail_answer(call, answer)

    def fail_answer(self, call: Call, answer: Any) -> NoReturn:
        """Report an answer of a wrong kind."""
        found = " ".join(repr(answer).split())[:MOST_SHOWN]
        self.fail("I8", f"{shown(call)} returned {found}: expected {EXPECTED[call[0]]}")

    def run_short(
        self, call: Call, num_needed: int, *, invariant: str = "I8", if_granted: str = "I1", **options: object
    ) -> None:
        """Make a call that needs more blocks than are free: it must say so, and change nothing.

        `invariant`: what is broken by a change; `if_granted`: by a success, which needs blocks that somebody holds.
        """
        caps, model = self.capabilities, self.model
        never_fits = num_needed > (model.num_host_blocks if call[0] == "swap_out" else model.num_blocks)
        before = self.snapshot()
        reason = f"{num_needed} blocks are needed" + (", more than there are" if never_fits else ", fewer are free")
        try:
            found = self.make(call, options)
        except caps.shortage:
            self.unchanged(before, invariant, call, "ran short of blocks")
            self.count((call[0], "short"))
            return
        except ANYTHING as error:
            self.fail(
                "I12" if never_fits else "I8",
                f"{shown(call)} raised {shown_error(error)}, expected a shortage: {reason}",
            )
        self.fail(
            "I12" if never_fits else if_granted, f"{shown(call)} returned {found!r}, expected a shortage: {reason}"
        )

    def refuse(self, call: Call, *, invariant: str = "I8", **options: object) -> None:
        """Make a call that must be refused as the caller's mistake, and change nothing."""
        if not self.capabilities.checks_ids and invariant == "I8":
            return
        before = self.snapshot()
        try:
            self.make(call, options)
        except self.capabilities.mistakes:
            self.unchanged(before, invariant, call, "was refused")
            self.count((call[0], "refused"))
            return
        except ANYTHING as error:
            self.fail(invariant, f"{shown(call)} raised {shown_error(error)}, expected the refusal of a mistake")
        self.fail(invariant, f"{shown(call)} was accepted, expected the refusal of a mistake")

    def fail(self, invariant: str, message: str) -> NoReturn:
        """Report what was broken."""
        raise InvariantViolation(invariant, message) from None

    # What nothing may change

    def check_given(self, call: Call, given: list[Any]) -> None:
        """A list of tokens is the caller's, and stays as it was. O(tokens)."""
        if given != call[-1]:
            self.fail("I8", f"{shown(call)} changed its argument: it has become {given}")

    def snapshot(self) -> object:
        """The numbers of free blocks; where a recount is due, the allocator's own state if it shows that."""
        num_free_host = self.ask("num_free_host") if self.model.num_host_blocks else 0
        is_due = (self.num_calls + 1) % self.check_every == 0
        return self.ask("num_free"), num_free_host, self.succeed(("state",)) if is_due and self._shows_state else None

    def unchanged(self, before: object, invariant: str, call: Call, ending: str) -> None:
        """Compare with what a snapshot showed before a call that ended in some way, and may have changed nothing."""
        after = self.snapshot()
        try:
            is_changed = bool(after != before)
        except ANYTHING as error:
            raise ConfigError(f"values of state() must compare with ==: that raised {shown_error(error)}") from error
        if is_changed:
            self.fail(invariant, f"{shown(call)} {ending} and changed the state: expected {before}, found {after}")
        if self.check_every == 1:  # Else it may have been any of the calls since the last recount.
            self.compare_tables(invariant)

    # After each call

    def count(self, result: tuple[Any, ...], sequence_id: Hashable = None) -> None:
        """Note the result; compare free blocks, and every so often all tables and all content."""
        self.log.append(result)
        self.num_calls += 1
        if self._given is not None:
            self.check_given(*self._given)
            self._given = None
        self.compare_free(result[0])
        if self.num_calls % self.check_every == 0:
            self.recount()
        elif sequence_id is not None:
            self.compare_table(sequence_id, self.model.sequences[sequence_id])
        if self.num_calls % self.read_every == 0:
            for id_, sequence in self.model.sequences.items():
                self.read(id_, sequence)

    def compare_free(self, verb: str) -> None:
        """Free blocks of both tiers as the allocator counts them, against the blocks that no table names. O(1)."""
        model, question = self.model, "num_free"
        try:  # Not by `ask`, which costs as much again: no other question is asked after every call.
            if self.allocator.num_free() == model.num_free:
                question = "num_free_host"
                if not model.num_host_blocks or self.allocator.num_free_host() == model.num_free_host:
                    return
        except ANYTHING as error:
            self.fail("I8", f"{question}() raised {shown_error(error)}: expected an answer")
        if question == "num_free":
            self._fail_free(verb, "device", self.ask(question), model.num_free)
        self._fail_free(verb, "host", self.ask(question), model.num_free_host)

    def _fail_free(self, verb: str, tier: str, found: int, expected: int) -> NoReturn:
        """Say which invariant a wrong number of free blocks breaks."""
        what = f"{found} {tier} blocks are free after {shown(self.calls[-1])}, the tables leave {expected}"
        self.compare_tables()
        invariant = "I9" if verb == "close" else "I2"
        if found > expected and tier == "device" and self._hands_out_held_blocks(found):
            invariant, what = "I1", f"{what}: asked for them all, it hands out blocks that tables name"
        self.fail(invariant, what)

    def compare_tables(self, invariant: str = "I1") -> None:
        """Every table against the model's. O(blocks held)."""
        for id_, sequence in self.model.sequences.items():
            self.compare_table(id_, sequence, invariant)

    def _hands_out_held_blocks(self, num_blocks: int) -> bool:
        """Whether too many free blocks are some that a table still names, or some that are listed twice.

        Takes them all to see; the allocator is broken anyway.
        """
        num_tokens = num_blocks * self.model.block_size
        try:
            self.allocator.open("all that is free", [FRESH_TOKEN] * num_tokens, salt=b"")
            if self.capabilities.chunked_prefill:
                self.allocator.append("all that is free", num_tokens)
            return any(self.model.num_holders[block_id] for block_id in self.table("all that is free"))
        except ANYTHING:
            return False

    def recount(self) -> None:
        """Every table against the model's, and every so often the allocator's own check. O(blocks held)."""
        self.compare_tables()
        if self._own_check is not None and self.num_calls % (OWN_CHECK_EVERY * self.check_every) == 0:
            try:
                self._own_check()
            except InvariantViolation:
                raise
            except ANYTHING as error:
                self.fail("I1", f"its own check raised {shown_error(error)} after {shown(self.calls[-1])}")

    def compare_table(self, sequence_id: Hashable, sequence: ModelSequence, invariant: str = "I1") -> None:
        """One table: nothing but its own verbs may change it."""
        found = self.table(sequence_id)
        if found != sequence.blocks:
            self.fail(
                invariant,
                f"block table of {sequence_id!r} after {shown(self.calls[-1])}: expected {sequence.blocks}, found {found}",
            )

    def read(self, sequence_id: Hashable, sequence: ModelSequence) -> None:
        """Read a sequence back through its table: every token must be what was written for it. O(tokens)."""
        is_swapped = sequence.host_blocks is not None
        blocks = sequence.blocks if sequence.host_blocks is None else sequence.host_blocks
        position = self.content.first_difference(blocks, sequence.histories, sequence.num_computed, on_host=is_swapped)
        if position is not None:
            invariant = "I6" if sequence.was_swapped else "I4"
            block_id = blocks[position // self.model.block_size]
            self.fail(
                invariant,
                f"token {position} of {sequence_id!r}, in {'host ' * is_swapped}block {block_id}, is not what was written for "
                f"it, after {shown(self.calls[-1])}",
            )

    def table(self, sequence_id: Hashable) -> list[int]:
        """The allocator's own table of a sequence."""
        blocks: list[int] = self.ask("block_table", sequence_id)
        return blocks


def checked_capabilities(allocator: AllocatorProtocol, capabilities: object) -> Capabilities:
    """What the allocator says it can do; raises ConfigError for a verb that it then lacks, and for no answer at all."""
    if not isinstance(capabilities, Capabilities):
        raise ConfigError(f"{type(allocator).__name__}.capabilities must be a Capabilities, found {capabilities!r:.60}")
    verbs = ["open", "extend", "append", "close", "block_table", "num_free"]
    verbs += ["lookup"] * capabilities.prefix_caching + ["fork"] * capabilities.forking
    verbs += ["truncate"] * capabilities.truncating + ["swap_out", "swap_in", "num_free_host"] * capabilities.swapping
    missing = [verb for verb in verbs if not callable(getattr(allocator, verb, None))]
    if missing:
        raise ConfigError(f"{type(allocator).__name__} lacks {', '.join(missing)}, which its capabilities say it has")
    return capabilities


def shown(call: Call) -> str:
    """A call as one would write it."""
    return f"{call[0]}({', '.join(map(repr, call[1:]))})"


def shown_error(error: BaseException) -> str:
    """Type and first line of an error."""
    message = str(error).splitlines()
    return f"{type(error).__name__}({message[0] if message else ''})"
