"""Random calls for an allocator trial, seeded: tiny pools, mostly, few ids, few tokens, so that collisions are the rule."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from itertools import accumulate
from random import Random
from typing import Any

from pagedkv.testing.allocator_model import AllocatorModel, ModelSequence

__all__ = ["ALPHABETS", "SALT_PAIRS", "Operation", "RandomOperations", "TrialSize", "large_size", "random_size"]

Operation = tuple[Any, ...]
"""A trial's verb and its arguments, as plain values."""
TrialSize = tuple[int, int, int]
"""Blocks, tokens per block, host blocks."""

IDS: tuple[Hashable, ...] = ("a", "b", "c", "d", "e")
SALT_PAIRS = ((b"", b"x"), (b"x", b"y"), (b"x", b"xx"), (b"x", b"x\0"), (b"x" * 63 + b"y", b"x" * 63 + b"z"))
"""Two tenants: one without a salt; salts that differ in their first, second, a zero or their last possible byte."""
ALPHABETS = ((0, 1), (0, 2**8), (0, 2**16), (0, 2**31 - 1))
"""Two tokens that differ; those of most are equal where they are cut to 8, 16 or 31 bits, or taken modulo a prime."""
BAD_NUMBERS = (-1, 0, 1000, 2**63, 2**70)
MAX_LENGTH = 12
NUM_REMEMBERED = 6


def random_size(random: Random) -> TrialSize:
    """1 to 10 blocks of 1 to 4 tokens, 0 to 6 host blocks."""
    num_blocks = random.choice((6, 8, 10, 3, 4, 5, 7, 9, 2, 1))
    return num_blocks, random.choice((2, 3, 2, 3, 4, 1)), random.choice((4, 6, 3, 5, 2, 1, 0))


def large_size(random: Random) -> TrialSize:
    """More blocks than eight bits can number, on both tiers."""
    return random.randint(300, 400), random.choice((1, 2)), random.choice((300, 4))


class RandomOperations:
    """Draws calls from what is live now. Each source leaves out some kinds of calls, so that the others crowd."""

    def __init__(self, random: Random, model: AllocatorModel) -> None:
        self.random = random
        self.model = model
        self.capabilities = model.capabilities
        self.prompts: list[tuple[list[int], bytes]] = []
        self.num_crowds = 0
        usual, other = random.choice(SALT_PAIRS)
        self.alphabet = random.choice(ALPHABETS)
        self.salts = (usual, usual, usual, other)
        always = (self.open_prompt, self.decode)
        weights = self._weights()
        self.kinds = [kind for kind in weights if kind in always or random.random() < 0.75]
        self.cum_weights = list(accumulate(weights[kind] for kind in self.kinds))

    def _weights(self) -> dict[Callable[[], Iterator[Operation]], int]:
        """How often each kind is drawn; kinds that the allocator is not capable of are left out."""
        caps = self.capabilities
        weights: dict[Callable[[], Iterator[Operation]], int] = {
            self.open_prompt: 10,
            self.decode: 14,
            self.close: 6,
            self.crowd: 3,
            self.make_a_mistake: 2,
        }
        if caps.prefix_caching:
            weights |= {self.close_and_reopen: 5, self.lookup: 3, self.open_twins: 3}
        if caps.chunked_prefill:
            weights |= {self.append_some: 8}
        if caps.forking:
            weights |= {self.fork: 3, self.fork_and_write_both: 6}
        if caps.truncating:
            weights |= {self.truncate: 4, self.reject_and_decode: 4}
        if caps.swapping and self.model.num_host_blocks:
            weights |= {self.swap_out: 4, self.swap_in: 6, self.swap_out_and_crowd: 4}
        return weights

    def draw(self) -> Iterator[Operation]:
        """The next few calls. Each must be carried out before the next one is asked for."""
        return self.random.choices(self.kinds, cum_weights=self.cum_weights)[0]()

    # Picking

    def _live_id(self) -> Hashable:
        live = list(self.model.sequences)
        return self.random.choice(live) if live and self.random.random() < 0.98 else self.random.choice(IDS)

    def _device_id(self) -> Hashable:
        on_device = [id_ for id_, sequence in self.model.sequences.items() if sequence.host_blocks is None]
        return self.random.choice(on_device) if on_device else self._live_id()

    def _fresh_id(self) -> Hashable:
        free = [id_ for id_ in IDS if id_ not in self.model.sequences]
        return self.random.choice(free) if free and self.random.random() < 0.95 else self.random.choice(IDS)

    def _num_pending(self, id_: Hashable) -> int:
        sequence = self.model.sequences.get(id_)
        return sequence.num_pending if sequence is not None else 1

    def _tokens(self, at_most: int) -> list[int]:
        return self.random.choices(self.alphabet, k=self.random.randint(1, at_most))

    def _prompt(self) -> tuple[list[int], bytes]:
        """A prompt like one before, or a new one of runs of equal tokens, which share prefixes with each other."""
        random = self.random
        if self.prompts and random.random() < 0.4:
            tokens, salt = random.choice(self.prompts)
            tokens = tokens + self._tokens(2) if random.random() < 0.5 else tokens
            salt = random.choice(self.salts) if random.random() < 0.2 else salt
        else:
            (stem, other), cut, length = (
                random.sample(self.alphabet, 2),
                random.randint(0, 6),
                random.randint(1, MAX_LENGTH),
            )
            tokens = ([stem] * cut + [other] * MAX_LENGTH)[:length]
            salt = random.choice(self.salts)
        self.prompts = [*self.prompts[1 - NUM_REMEMBERED :], (tokens, salt)]
        return tokens, salt

    def _append_all(self, id_: Hashable) -> Iterator[Operation]:
        """What is pending; mostly, where it does not fit, others are closed first or less is appended."""
        sequence = self.model.sequences.get(id_)
        if sequence is not None and sequence.host_blocks is None and self.random.random() < 0.8:
            yield from self._make_room(id_, sequence)
        if self.capabilities.chunked_prefill:
            yield ("append", id_, self._num_pending(id_))
        else:
            for _ in range(self._num_pending(id_)):
                yield ("append", id_, 1)

    def _make_room(self, id_: Hashable, sequence: ModelSequence) -> Iterator[Operation]:
        others = [other for other in self.model.sequences if other != id_]
        while others and self.model.num_needed(sequence, sequence.num_pending) > self.model.num_free:
            yield ("close", others.pop(self.random.randrange(len(others))))
        if self.capabilities.truncating and sequence.num_pending > 1:
            num_most = (self.model.num_free + len(sequence.blocks)) * self.model.block_size
            if len(sequence.histories) > num_most > 0:
                yield ("truncate", id_, max(num_most, sequence.num_computed))

    def _spare_id(self) -> Iterator[Operation]:
        """See to it that an id is free, mostly."""
        if len(self.model.sequences) >= len(IDS) and self.random.random() < 0.9:
            yield ("close", self._live_id())

    # Kinds of calls

    def open_prompt(self) -> Iterator[Operation]:
        """A prompt, mostly computed at once."""
        yield from self._spare_id()
        id_, (tokens, salt) = self._fresh_id(), self._prompt()
        yield ("open", id_, tokens, salt)
        if self.random.random() < 0.8:
            yield from self._append_all(id_)

    def open_twins(self) -> Iterator[Operation]:
        """Two that compute the same blocks at once: only one can name its own, and only what it has computed."""
        yield from self._spare_id()
        tokens, salt = self._prompt()
        twins = [self._fresh_id()]
        yield ("open", twins[0], tokens, salt)
        if self.capabilities.chunked_prefill and self.random.random() < 0.6:
            yield ("append", twins[0], self.random.randint(0, self._num_pending(twins[0])))
        twins.append(self._fresh_id())
        yield ("open", twins[1], tokens, salt)
        for id_ in twins:
            yield from self._append_all(id_)

    def close_and_reopen(self) -> Iterator[Operation]:
        """The next turn of a conversation: what is still cached must be hit."""
        id_ = self._live_id()
        yield ("close", id_)
        tokens, salt = self._prompt()
        yield ("open", id_, tokens, salt)
        yield from self._append_all(id_)

    def lookup(self) -> Iterator[Operation]:
        """Ask, and change nothing."""
        yield ("lookup", *self._prompt())

    def close(self) -> Iterator[Operation]:
        """Close, now and then twice; what the sequence has named must be found, and nothing else."""
        id_ = self._live_id()
        sequence = self.model.sequences.get(id_)
        yield ("close", id_)
        if self.random.random() < 0.15:
            yield ("close", id_)
        if sequence is not None and self.capabilities.prefix_caching and self.random.random() < 0.5:
            yield ("lookup", [*sequence.tokens, 0], sequence.salt)

    def crowd(self) -> Iterator[Operation]:
        """A sequence that shares nothing and takes all free blocks, but one, or one too many."""
        yield from self._spare_id()
        self.num_crowds += 1
        id_, num_spared = self._fresh_id(), self.random.choice((0, 0, 0, 1, 2, -1, -12))
        num_tokens = (self.model.num_free - num_spared) * self.model.block_size
        if num_tokens > 0:
            yield ("open", id_, [1 + self.num_crowds] * num_tokens, b"")
            yield from self._append_all(id_)

    def decode(self) -> Iterator[Operation]:
        """One token more, or a few."""
        if not self.model.sequences:
            yield from self.open_prompt()
        id_ = self._device_id()
        yield ("extend", id_, self._tokens(3))
        yield from self._append_all(id_)

    def append_some(self) -> Iterator[Operation]:
        """A chunk of what is known, or a token too many."""
        id_ = self._device_id()
        yield ("append", id_, self.random.randint(0, self._num_pending(id_) + (self.random.random() < 0.1)))

    def fork(self) -> Iterator[Operation]:
        """Share a sequence's blocks."""
        yield from self._spare_id()
        yield ("fork", self._device_id(), self._fresh_id())

    def fork_and_write_both(self) -> Iterator[Operation]:
        """Fork, in the middle of a block if need be, and let both go on."""
        yield from self._spare_id()
        source, child = self._device_id(), self._fresh_id()
        sequence = self.model.sequences.get(source)
        if sequence is not None and len(sequence.histories) % self.model.block_size == 0:
            yield ("extend", source, [0])
        yield from self._append_all(source)
        yield ("fork", source, child)
        both = [source, child] if self.random.random() < 0.5 else [child, source]
        for id_ in both:
            yield ("extend", id_, self._tokens(1))
            yield from self._append_all(id_)

    def truncate(self) -> Iterator[Operation]:
        """Drop some tokens, or ask for what cannot be."""
        id_ = self._device_id()
        sequence = self.model.sequences.get(id_)
        num_known = len(sequence.histories) if sequence is not None else 1
        yield ("truncate", id_, self.random.randint(0 if self.random.random() < 0.05 else 1, num_known))

    def reject_and_decode(self) -> Iterator[Operation]:
        """Drop a few guessed tokens and go on with others."""
        id_ = self._device_id()
        sequence = self.model.sequences.get(id_)
        num_known = len(sequence.histories) if sequence is not None else 1
        yield ("truncate", id_, max(1, num_known - self.random.randint(1, 3)))
        yield ("extend", id_, self._tokens(4))
        yield from self._append_all(id_)

    def swap_out(self) -> Iterator[Operation]:
        """To the host."""
        yield ("swap_out", self._device_id())

    def swap_in(self) -> Iterator[Operation]:
        """And back; a swapped sequence refuses all else."""
        swapped = [id_ for id_, sequence in self.model.sequences.items() if sequence.host_blocks is not None]
        if not swapped:
            yield from self.swap_out()
            swapped = [id_ for id_, sequence in self.model.sequences.items() if sequence.host_blocks is not None]
        id_ = self.random.choice(swapped) if swapped else self._live_id()
        if swapped and self.random.random() < 0.1:
            yield self.random.choice((("append", id_, 0), ("truncate", id_, 1), ("fork", id_, "z"), ("swap_out", id_)))
        yield ("swap_in", id_)

    def swap_out_and_crowd(self) -> Iterator[Operation]:
        """Take a sequence's blocks away while it is on the host, some or all, and bring it back."""
        id_ = self._device_id()
        yield ("swap_out", id_)
        before = set(self.model.sequences)
        yield from self.crowd()
        for other in [other for other in self.model.sequences if other not in before and self.random.random() < 0.7]:
            yield ("close", other)
        yield ("swap_in", id_)

    def make_a_mistake(self) -> Iterator[Operation]:
        """Unknown and duplicate ids, and numbers that are none."""
        live, number, unknown = self._live_id(), self.random.choice(BAD_NUMBERS), "never opened"
        kind = self.random.randrange(9)
        if kind == 0:
            yield ("open", live, [1], b"")
        elif kind == 1:
            yield ("fork", live, live)
        elif kind == 2:
            yield ("append", live, -1 if number == 0 else number)
        elif kind == 3:
            yield ("truncate", live, number)
        elif kind == 4:
            yield ("open", self._fresh_id(), [], b"")
        else:
            arguments: tuple[Operation, ...] = (("append", 1), ("extend", [1]), ("close",), ("swap_in",), ("fork", "z"))
            verb, *rest = self.random.choice(arguments)
            yield (verb, unknown, *rest)
