"""Every policy against a naive model of it, while sequences of a small tree of prefixes come, fork, shrink and go.

The models keep plain lists and search them; the tree is told by the names themselves ("ab" continues "a"). After every
step the whole order of eviction is predicted, and every allocation's victims.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pagedkv import BlockPool, PrefixCache
from pagedkv.eviction import POLICY_NAMES, make_policy


class NaiveLRU:
    """Names in the order in which they were let go."""

    def __init__(self, num_blocks):
        self.let_go = []

    def on_name(self, name): ...

    def on_hit(self, name): ...

    def on_let_go(self, name):
        self.let_go = [other for other in self.let_go if other != name] + [name]

    def on_unname(self, name):
        self.let_go = [other for other in self.let_go if other != name]

    def take_victim(self, leaves):
        victim = next(name for name in self.let_go if name in leaves)
        self.on_unname(victim)
        return victim


class NaiveFIFO:
    def __init__(self, num_blocks):
        self.queue = []

    def on_name(self, name):
        self.queue.append(name)

    def on_hit(self, name): ...

    def on_let_go(self, name): ...

    def on_unname(self, name):
        self.queue.remove(name)

    def take_victim(self, leaves):
        victim = next(name for name in self.queue if name in leaves)
        self.queue.remove(victim)
        return victim


class NaiveSIEVE:
    """The queue with its serial numbers; the hand is the number that it looks for next."""

    def __init__(self, num_blocks):
        self.queue, self.visited, self.num_named, self.hand = [], set(), 0, 0

    def on_name(self, name):
        self.queue.append((self.num_named, name))
        self.num_named += 1

    def on_hit(self, name):
        self.visited.add(name)

    def on_let_go(self, name): ...

    def on_unname(self, name):
        self.queue = [entry for entry in self.queue if entry[1] != name]
        self.visited.discard(name)

    def take_victim(self, leaves):
        while True:
            stops = [entry for entry in self.queue if entry[1] in leaves]
            number, name = next((entry for entry in stops if entry[0] >= self.hand), stops[0])
            self.hand = 0 if number + 1 == self.num_named else number + 1
            if name not in self.visited:
                self.on_unname(name)
                return name
            self.visited.remove(name)


class NaiveS3FIFO:
    def __init__(self, num_blocks):
        self.small, self.main, self.ghost, self.hits = [], [], [], {}
        self.share = max(1, num_blocks // 10)
        self.max_ghosts = num_blocks - self.share

    def on_name(self, name):
        self.hits[name] = 0
        if name in self.ghost:
            self.ghost.remove(name)
            self.main.append(name)
        else:
            self.small.append(name)

    def on_hit(self, name):
        self.hits[name] = min(3, self.hits[name] + 1)

    def on_let_go(self, name): ...

    def on_unname(self, name):
        (self.small if name in self.small else self.main).remove(name)

    def take_victim(self, leaves):
        while True:
            queues = [self.small, self.main] if len(self.small) >= self.share else [self.main, self.small]
            queue = next(queue for queue in queues if leaves & set(queue))
            name = next(name for name in queue if name in leaves)
            queue.remove(name)
            if self.hits[name] < (2 if queue is self.small else 1):
                if queue is self.small:
                    self.ghost = [*self.ghost, name][-self.max_ghosts :] if self.max_ghosts else []
                return name
            self.hits[name] = 0 if queue is self.small else self.hits[name] - 1
            self.main.append(name)


NAIVE = {"lru": NaiveLRU, "fifo": NaiveFIFO, "s3-fifo": NaiveS3FIFO, "sieve": NaiveSIEVE}


class Model:
    """Which names are resident, how many hold each, and the naive policy."""

    def __init__(self, policy):
        self.policy = policy
        self.holders = {}

    def evictable(self):
        return {name for name, count in self.holders.items() if count == 0}

    def evict(self, num):
        victims = []
        for _ in range(num):
            parents = {name[:-1] for name in self.holders}
            victim = self.policy.take_victim(self.evictable() - parents)
            del self.holders[victim]
            victims.append(victim)
        return victims

    def order(self):
        return copy.deepcopy(self).evict(len(self.evictable()))


class Sequence:
    """Blocks that are held for a text; the first `num_named` of them are the named ones of its prefixes."""

    def __init__(self, text, blocks, num_named, may_name=True):
        self.text, self.blocks, self.num_named, self.may_name = text, blocks, num_named, may_name

    def names(self):
        return [self.text[: i + 1] for i in range(self.num_named)]


texts = st.text(alphabet="ab", min_size=1, max_size=4)
picks = st.integers(0, 100)


class PolicyMachine(RuleBasedStateMachine):
    policy_name = "lru"

    @initialize(num_blocks=st.sampled_from([4, 6, 10, 21]))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, make_policy(self.policy_name, num_blocks))
        self.cache = PrefixCache(self.pool)
        self.model = Model(NAIVE[self.policy_name](num_blocks))
        self.sequences = []

    def block_of(self, name):
        return int(self.cache.blocks([name.encode()], 1)[0])

    def names_of(self, blocks):
        return [self.cache.key_of(int(block)).decode() for block in blocks]

    def allocate(self, num):
        """Allocate, checking the victims against the model's; None if there are too few."""
        num_evicted = max(0, num - self.pool.num_free)
        if num_evicted > len(self.model.evictable()):
            assert self.pool.try_allocate(num) is None
            return None
        num_free = min(num, self.pool.num_free)
        victims = [self.block_of(name) for name in self.model.evict(num_evicted)]
        blocks = self.pool.allocate(num)
        assert blocks[num_free:].tolist() == victims
        return blocks

    def hold(self, sequence):
        for name in sequence.names():
            self.model.holders[name] += 1
            self.model.policy.on_hit(name)

    def let_go(self, sequence, num_kept):
        """Release the blocks behind the first `num_kept`, deepest first."""
        self.pool.release(sequence.blocks[num_kept:][::-1])
        for name in sequence.names()[num_kept:][::-1]:
            self.model.holders[name] -= 1
            if self.model.holders[name] == 0:
                self.model.policy.on_let_go(name)
        sequence.blocks = sequence.blocks[:num_kept]
        sequence.num_named = min(sequence.num_named, num_kept)
        sequence.text = sequence.text[:num_kept]

    def name_up_to(self, sequence, num_named):
        if not sequence.may_name or num_named <= sequence.num_named:
            return
        start = sequence.num_named
        names = [sequence.text[: i + 1] for i in range(start, num_named)]
        parent = int(sequence.blocks[start - 1]) if start else -1
        is_new = self.cache.name_chain([name.encode() for name in names], sequence.blocks[start:num_named], parent) > 0
        assert is_new == (names[0] not in self.model.holders)
        sequence.may_name = is_new
        if is_new:
            sequence.num_named = num_named
            for name in names:
                self.model.holders[name] = 1
                self.model.policy.on_name(name)

    @rule(text=texts, num_named=st.integers(0, 4))
    def open(self, text, num_named):
        keys = [text[: i + 1].encode() for i in range(len(text))]
        num_hit = sum(text[: i + 1] in self.model.holders for i in range(len(text)))
        assert self.cache.num_resident(keys, len(keys)) == num_hit
        hits = self.cache.blocks(keys, num_hit)
        self.pool.acquire(hits)
        sequence = Sequence(text, hits, num_hit)
        self.hold(sequence)
        new = self.allocate(len(text) - num_hit)
        if new is None:
            self.let_go(sequence, 0)
            return
        sequence.blocks = np.concatenate((hits, new))
        self.sequences.append(sequence)
        self.name_up_to(sequence, min(num_named, len(text)))

    @rule(text=texts)
    def use(self, text):
        """The common case: hits, names and lets go of everything at once."""
        num_open = len(self.sequences)
        self.open(text, len(text))
        if len(self.sequences) > num_open:
            self.let_go(self.sequences.pop(), 0)

    @rule(pick=picks, num_named=st.integers(1, 4))
    def name_more(self, pick, num_named):
        if self.sequences:
            sequence = self.sequences[pick % len(self.sequences)]
            self.name_up_to(sequence, min(num_named, len(sequence.text)))

    @rule(text=st.text(alphabet="ab", min_size=1, max_size=2))
    def name_siblings_in_one_call(self, text):
        """Two sequences leave a common prefix in the same step."""
        for last in "ab":
            self.open(text + last, len(text))
        self.name_one_more_of_each()

    @rule()
    def name_one_more_of_each(self):
        """What a step of decoding does: every sequence names its next block, in one call; the first of equals wins."""
        naming = [each for each in self.sequences if each.may_name and each.num_named < len(each.text)]
        if not naming:
            return
        names = [each.text[: each.num_named + 1] for each in naming]
        own = np.array([each.blocks[each.num_named] for each in naming], np.int64)
        parents = np.array([each.blocks[each.num_named - 1] if each.num_named else -1 for each in naming], np.int64)
        is_new = self.cache.name_each([name.encode() for name in names], own, parents)
        for each, name, new in zip(naming, names, is_new.tolist(), strict=True):
            assert new == (name not in self.model.holders)
            each.may_name = new
            if new:
                each.num_named += 1
                self.model.holders[name] = 1
                self.model.policy.on_name(name)

    @rule(pick=picks)
    def fork(self, pick):
        """Both hold the same blocks, unnamed ones too, and leave those unnamed."""
        if self.sequences:
            parent = self.sequences[pick % len(self.sequences)]
            parent.may_name = False
            self.pool.acquire(parent.blocks)
            self.hold(parent)
            self.sequences.append(Sequence(parent.text, parent.blocks, parent.num_named, may_name=False))

    @rule(pick=picks, num_kept=st.integers(1, 3))
    def truncate(self, pick, num_kept):
        if self.sequences:
            sequence = self.sequences[pick % len(self.sequences)]
            self.let_go(sequence, min(num_kept, len(sequence.text)))

    @rule(pick=picks)
    def close(self, pick):
        if self.sequences:
            self.let_go(self.sequences.pop(pick % len(self.sequences)), 0)

    @rule(num=st.integers(1, 6))
    def take_blocks_for_something_else(self, num):
        blocks = self.allocate(num)
        if blocks is not None:
            self.pool.release(blocks[::-1])

    @rule(pick=picks)
    def unname_a_branch(self, pick):
        """Take the name from a block, held or not, and from everything that continues it."""
        if not self.model.holders:
            return
        root = sorted(self.model.holders)[pick % len(self.model.holders)]
        names = sorted(name for name in self.model.holders if name.startswith(root))
        self.cache.unname(np.array([self.block_of(name) for name in names], np.int64))
        for name in names:
            del self.model.holders[name]
            self.model.policy.on_unname(name)
        for sequence in self.sequences:
            num_named = sum(name in self.model.holders for name in sequence.names())
            sequence.may_name &= num_named == sequence.num_named
            sequence.num_named = num_named

    @invariant()
    def everything_is_as_the_model_says(self):
        if not hasattr(self, "model"):
            return
        self.pool.check_invariants()
        self.cache.check_invariants()
        resident = self.model.holders.keys()
        assert len(self.cache) == len(resident)
        assert all(name[:-1] in resident for name in resident if len(name) > 1)
        assert len(self.pool.policy) == len(self.model.evictable())
        assert self.names_of(self.pool.policy.order()) == self.model.order()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_the_policy_does_what_its_naive_model_does(name):
    machine = type("Machine", (PolicyMachine,), {"policy_name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=80,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
