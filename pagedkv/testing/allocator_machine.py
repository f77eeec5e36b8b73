"""A Hypothesis state machine over an allocator trial, to be extended with rules of one's own."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pagedkv.testing.allocator_model import ModelSequence
from pagedkv.testing.allocator_protocol import MakeAllocator
from pagedkv.testing.allocator_trial import AllocatorTrial
from pagedkv.testing.random_operations import ALPHABETS, SALT_PAIRS

__all__ = ["AllocatorMachine"]

LARGE = 300
"""More blocks than eight bits can number."""
REPEAT_EVERY = 8
BAD_NUMBERS = (-1, 1000, 2**63, 2**70)
UNKNOWN = ("never opened", "", "\N{SNOWMAN}", 99, ())

small = st.integers(0, 5)
bits = st.integers(0, 1)
tenants = st.sampled_from((0, 0, 0, 1))
few_bits = st.lists(bits, min_size=1, max_size=4)


class AllocatorMachine(RuleBasedStateMachine):
    """Rules for every verb, their wrong use, and the combinations in which bugs live.

    Subclass it, set `make_allocator`, and add rules that call `self.trial`; or let AllocatorTests do so. Pools have 1 to
    10 blocks of 1 to 4 tokens, now and then 300. Hypothesis leaves a random part of the rules out of each example, so that
    the others crowd.

    `trial.model.sequences` holds what is live, so rules can pick from it; every verb of the trial takes any argument.
    """

    make_allocator: ClassVar[MakeAllocator]
    trial: AllocatorTrial

    @initialize(
        num_blocks=st.sampled_from((6, 8, 10, 3, 4, 5, 7, 9, 2, 1, LARGE)),
        block_size=st.sampled_from((2, 3, 2, 3, 4, 1)),
        num_host_blocks=st.sampled_from((4, 6, 3, 5, 2, 1, 0)),
        length=st.integers(1, 12),
        tenants=st.tuples(st.sampled_from(ALPHABETS), st.sampled_from(SALT_PAIRS)),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        length: int,
        tenants: tuple[tuple[int, int], tuple[bytes, bytes]],
    ) -> None:
        """A fresh allocator with one sequence."""
        self.alphabet, self.salts = tenants
        self.trial = AllocatorTrial(type(self).make_allocator, num_blocks, block_size, num_host_blocks)
        self.prompts: list[tuple[list[int], bytes]] = []
        self.num_crowds = 0
        self.open_prompt(0, self.spelt(([0] * 3 + [1] * 9)[:length]), self.salts[0], is_computed=True)

    # What rules are made of

    @property
    def live(self) -> dict[Hashable, ModelSequence]:
        """Sequences that are open, by id."""
        return self.trial.model.sequences

    def can(self, capability: str) -> bool:
        """Whether the allocator has a capability."""
        return bool(getattr(self.trial.capabilities, capability))

    def spelt(self, bits: list[int]) -> list[int]:
        """Bits as the two tokens of this example, which an allocator may confuse."""
        return [self.alphabet[bit] for bit in bits]

    def pick(self, number: int) -> Hashable:
        """The id of a live sequence."""
        return list(self.live)[number % len(self.live)]

    def pick_on_device(self, number: int) -> Hashable:
        """The id of a live sequence that is not swapped out, if there is one."""
        ids = [id_ for id_, sequence in self.live.items() if sequence.host_blocks is None]
        return ids[number % len(ids)] if ids else self.pick(number)

    def open_prompt(self, id_: Hashable, tokens: list[int], salt: bytes, *, is_computed: bool) -> None:
        """Open, and compute what was not hit."""
        self.trial.open(id_, tokens, salt)
        self.prompts = [*self.prompts[-5:], (tokens, salt)]
        if is_computed:
            self.append_all(id_)

    def append_all(self, id_: Hashable) -> None:
        """Give every known token a slot."""
        num_pending = self.live[id_].num_pending if id_ in self.live else 1
        if self.can("chunked_prefill"):
            self.trial.append(id_, num_pending)
        else:
            for _ in range(num_pending):
                self.trial.append(id_, 1)

    def go_on(self, id_: Hashable, tokens: list[int]) -> None:
        """Extend and append."""
        self.trial.extend(id_, tokens)
        self.append_all(id_)

    # Opening and closing

    @rule(
        id_=small,
        stem=bits,
        cut=st.integers(0, 6),
        length=st.integers(1, 12),
        tenant=tenants,
        now=st.booleans(),
    )
    def open_new(self, id_: int, stem: int, cut: int, length: int, tenant: int, now: bool) -> None:
        """Runs of equal tokens share prefixes with each other."""
        tokens = self.spelt(([stem] * cut + [1 - stem] * 12)[:length])
        self.open_prompt(id_, tokens, self.salts[tenant], is_computed=now)

    @precondition(lambda self: self.prompts)
    @rule(id_=small, number=small, more=st.lists(bits, max_size=2), tenant=st.sampled_from((None, None, 0, 1)))
    def open_again(self, id_: int, number: int, more: list[int], tenant: int | None) -> None:
        """A prompt like one before, under the same salt or another."""
        tokens, own_salt = self.prompts[number % len(self.prompts)]
        self.open_prompt(
            id_, tokens + self.spelt(more), own_salt if tenant is None else self.salts[tenant], is_computed=True
        )

    @precondition(lambda self: self.prompts)
    @rule(first=small, second=small, number=small, num_tokens=st.integers(0, 12))
    def open_twins(self, first: int, second: int, number: int, num_tokens: int) -> None:
        """Two compute the same blocks at once; the second comes when the first has computed some of them."""
        tokens, salt = self.prompts[number % len(self.prompts)]
        for id_ in (first, second):
            if id_ in self.live:
                self.trial.close(id_)
        self.trial.open(first, tokens, salt)
        if self.can("chunked_prefill") and first in self.live:
            self.trial.append(first, min(num_tokens, self.live[first].num_pending))
        self.trial.open(second, tokens, salt)
        self.append_all(first)
        self.append_all(second)

    @precondition(lambda self: self.live)
    @rule(number=small, is_twice=st.booleans())
    def close(self, number: int, is_twice: bool) -> None:
        """Once, or once too often."""
        id_ = self.pick(number)
        self.trial.close(id_)
        if is_twice:
            self.trial.close(id_)

    @precondition(lambda self: self.live)
    @rule(number=small, again=small)
    def close_and_reopen(self, number: int, again: int) -> None:
        """The next turn of a conversation: what is cached must be hit, and the same id may be used again."""
        id_ = self.pick(number)
        self.trial.close(id_)
        tokens, salt = self.prompts[again % len(self.prompts)]
        self.open_prompt(id_, [*tokens, 1], salt, is_computed=True)

    @precondition(lambda self: self.can("prefix_caching") and self.prompts)
    @rule(number=small, more=st.lists(bits, max_size=2), tenant=tenants)
    def lookup(self, number: int, more: list[int], tenant: int) -> None:
        """Ask, and change nothing."""
        self.trial.lookup(self.prompts[number % len(self.prompts)][0] + self.spelt(more), self.salts[tenant])

    @precondition(lambda self: self.can("prefix_caching") and self.live)
    @rule(num_closed=st.integers(1, 3), num_left_out=st.integers(0, 4))
    def close_and_look_up(self, num_closed: int, num_left_out: int) -> None:
        """Ask for what the first of those that were closed has left in the cache."""
        closed = list(self.live.items())[:num_closed]
        for id_, _ in closed:
            self.trial.close(id_)
        tokens = closed[0][1].tokens
        self.trial.lookup([*tokens[: max(1, len(tokens) - num_left_out)], 0], closed[0][1].salt)

    @rule(id_=small, num_spared=st.sampled_from((0, 0, 1, 2, -1, -12)))
    def crowd(self, id_: int, num_spared: int) -> None:
        """A sequence that shares nothing and takes all free blocks, but a few, or a few too many."""
        self.num_crowds += 1
        num_tokens = (self.trial.model.num_free - num_spared) * self.trial.model.block_size
        if num_tokens > 0:
            self.trial.open(id_, [1 + self.num_crowds] * num_tokens)
            self.append_all(id_)

    # Growing, sharing, shrinking

    @precondition(lambda self: self.live)
    @rule(number=small, tokens=few_bits)
    def decode(self, number: int, tokens: list[int]) -> None:
        """More tokens."""
        self.go_on(self.pick_on_device(number), self.spelt(tokens))

    @precondition(lambda self: self.can("chunked_prefill") and self.live)
    @rule(number=small, num_tokens=st.integers(0, 6))
    def append(self, number: int, num_tokens: int) -> None:
        """A chunk, or more than is known."""
        self.trial.append(self.pick_on_device(number), num_tokens)

    @precondition(lambda self: self.can("forking") and self.live)
    @rule(number=small, id_=small)
    def fork(self, number: int, id_: int) -> None:
        """Share."""
        self.trial.fork(self.pick_on_device(number), id_)

    @precondition(lambda self: self.can("forking") and self.live)
    @rule(number=small, id_=small, child_first=st.booleans())
    def fork_and_write_both(self, number: int, id_: int, child_first: bool) -> None:
        """Fork in the middle of a block, where there is one, and let both go on."""
        source = self.pick_on_device(number)
        if len(self.live[source].histories) % self.trial.model.block_size == 0:
            self.trial.extend(source, [0])
        self.append_all(source)
        if id_ in self.live and id_ != source:
            self.trial.close(id_)
        self.trial.fork(source, id_)
        for one in (id_, source) if child_first else (source, id_):
            self.go_on(one, [1])

    @precondition(lambda self: self.can("truncating") and self.live)
    @rule(number=small, num_dropped=st.integers(0, 12))
    def truncate(self, number: int, num_dropped: int) -> None:
        """Drop tokens; all of them is a mistake."""
        id_ = self.pick_on_device(number)
        self.trial.truncate(id_, max(0, len(self.live[id_].histories) - num_dropped))

    @precondition(lambda self: self.can("truncating") and self.live)
    @rule(number=small, num_dropped=st.integers(1, 3), tokens=few_bits)
    def reject_and_decode(self, number: int, num_dropped: int, tokens: list[int]) -> None:
        """Drop guessed tokens, and go on with others."""
        id_ = self.pick_on_device(number)
        self.trial.truncate(id_, max(1, len(self.live[id_].histories) - num_dropped))
        self.go_on(id_, self.spelt(tokens))

    # Swapping

    @precondition(lambda self: self.can("swapping") and self.live)
    @rule(number=small)
    def swap_out(self, number: int) -> None:
        """To the host; while there, most verbs are mistakes."""
        id_ = self.pick_on_device(number)
        self.trial.swap_out(id_)
        if self.live[id_].host_blocks is not None:
            self.trial.append(id_, 0)
            self.trial.swap_out(id_)

    @precondition(lambda self: self.can("swapping") and self.live)
    @rule(number=small)
    def swap_in(self, number: int) -> None:
        """And back."""
        swapped = [id_ for id_, sequence in self.live.items() if sequence.host_blocks is not None]
        self.trial.swap_in(swapped[number % len(swapped)] if swapped else self.pick(number))

    @precondition(lambda self: self.can("swapping") and self.live)
    @rule(number=small, id_=small, num_spared=st.integers(0, 3), makes_room=st.booleans())
    def swap_out_crowd_and_swap_in(self, number: int, id_: int, num_spared: int, makes_room: bool) -> None:
        """Evict some of a sequence's blocks while it is on the host, and bring it back."""
        swapped = self.pick_on_device(number)
        self.trial.swap_out(swapped)
        if id_ in self.live and id_ != swapped:
            self.trial.close(id_)
        self.crowd(id_, num_spared)
        if makes_room and id_ != swapped and id_ in self.live:
            self.trial.close(id_)
        self.trial.swap_in(swapped)

    # Wrong use

    @precondition(lambda self: self.live)
    @rule(number=small, wrong=st.sampled_from(BAD_NUMBERS), unknown=st.sampled_from(UNKNOWN))
    def make_mistakes(self, number: int, wrong: int, unknown: Hashable) -> None:
        """Numbers out of range, ids that were never opened, and ids that are open already."""
        trial, id_ = self.trial, self.pick(number)
        trial.append(id_, wrong)
        trial.truncate(id_, wrong)
        trial.truncate(id_, 0)
        trial.open(id_, [1])
        trial.open("fresh", [])
        trial.fork(id_, id_)
        trial.fork(unknown, "fresh")
        trial.append(unknown, 1)
        trial.extend(unknown, [1])
        trial.truncate(unknown, 1)
        trial.swap_out(unknown)
        trial.swap_in(unknown)
        trial.close(unknown)

    def teardown(self) -> None:
        """Close everything: nothing may be left. Some examples are repeated on a fresh allocator, with equal results."""
        if not hasattr(self, "trial") or sys.exc_info()[0] is not None:  # What failed already is the news.
            return
        self.trial.finish()
        if self.trial.num_calls % REPEAT_EVERY == 0:
            self.trial.repeat()
