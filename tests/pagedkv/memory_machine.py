"""A Hypothesis machine that drives KVCacheManager and the plain model of memory_model.py side by side.

Beside them stands a *content shadow*: storage as a dict from slot to what was written there, which carries out the
plans as storage would (swaps out, copies, swaps in, writes) and is read back through the manager's own block tables.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_model import MemoryModel, ModelSequence

from pagedkv import (
    BlockStateError,
    CacheConfig,
    DuplicateIdError,
    InvalidArgumentError,
    KVCacheManager,
    OutOfBlocksError,
    UnknownIdError,
)

MAX_PINS = 3
NAMESPACES = ((b"", None), (b"x", None), (b"", "x"))


def digest(manager: KVCacheManager) -> dict[str, object]:
    """All that the manager knows, as plain values."""
    memory, table = manager.memory, manager.memory.sequences
    state: dict[str, object] = {}
    for name, pool in (("device", memory.pool), ("host", memory.host_pool)):
        ids = np.arange(pool.num_blocks, dtype=np.int32)
        state[f"{name} counts"] = pool.counts(ids).tolist()
        state[f"{name} named"] = pool.is_named(ids).tolist()
        state[f"{name} order"] = pool.order()
    state["keys"] = [memory.cache.key_of(block_id) for block_id in range(memory.pool.num_blocks)]
    state["num_keys"] = len(memory.cache)
    state["host_blocks"] = {row: blocks.tolist() for row, blocks in memory.host_blocks.items()}
    state["counters"] = dataclasses.asdict(memory.counters)
    state["num_sequences"] = len(manager)
    state["can_repeat"] = memory.leaps.are_possible
    rows = {}
    for row in np.flatnonzero(table.is_live).tolist():
        num_known = int(table.num_known[row])
        content = table.contents[row]
        tokens = None
        if hasattr(content, "token_ids"):
            tokens = memory.tokens.packed(np.array([row]), np.array([0]), np.array([num_known])).tolist()
        rows[row] = (
            num_known,
            int(table.num_computed[row]),
            int(table.num_named[row]),
            bool(table.has_shared_tail[row]),
            table.blocks(row).tolist(),
            list(content.keys(num_known // memory.block_size))[: num_known // memory.block_size],
            tokens,
        )
    state["rows"] = rows
    return state


def expect(what: str, actual: object, expected: object) -> None:
    """Raise AssertionError unless both are equal. A function, so that `-O` and a missing rewrite change nothing."""
    if actual != expected:
        raise AssertionError(f"{what}: expected {expected}, found {actual}")


small = st.integers(0, 5)
tokens_below_two = st.integers(0, 1)
namespace_idx = st.sampled_from((0, 0, 0, 1, 2))


class MemoryMachine(RuleBasedStateMachine):
    """Rules draw small numbers and reduce them to what exists, so that nearly every step does something."""

    @initialize(
        num_blocks=st.sampled_from((6, 8, 10, 3, 4, 5, 7, 9, 2, 1)),
        block_size=st.sampled_from((2, 3, 2, 3, 4, 1)),
        num_host_blocks=st.sampled_from((4, 6, 3, 5, 2, 1, 0)),
        prefix_caching=st.sampled_from((True, True, True, True, False)),
        length=st.integers(1, 12),
        appends_runs=st.booleans(),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        prefix_caching: bool,
        length: int,
        appends_runs: bool,
    ) -> None:
        self.appends_runs = appends_runs
        self.manager = KVCacheManager(CacheConfig(num_blocks, block_size, num_host_blocks, prefix_caching))
        self.model = MemoryModel(num_blocks, block_size, num_host_blocks, prefix_caching)
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.device: dict[int, object] = {}
        self.host: dict[int, object] = {}
        self.pins: list[tuple[object, ModelSequence]] = []
        self.prompts: list[tuple[int, list[int]]] = []
        self.num_queries = self.queried_tokens = self.hit_tokens = self.num_crowds = 0
        self.open_prompt(0, 0, ([0] * 3 + [1] * 9)[:length], is_computed=True)

    # Opening, pinning, closing

    @rule(
        id_=small,
        namespace=namespace_idx,
        stem=tokens_below_two,
        cut=st.integers(0, 6),
        length=st.integers(1, 12),
        is_computed=st.booleans(),
    )
    def open(self, id_: int, namespace: int, stem: int, cut: int, length: int, is_computed: bool) -> None:
        self.open_prompt(id_, namespace, ([stem] * cut + [1 - stem] * 12)[:length], is_computed=is_computed)

    @precondition(lambda self: self.prompts)
    @rule(id_=small, pick=small, more=st.lists(tokens_below_two, max_size=2), is_computed=st.booleans())
    def reopen(self, id_: int, pick: int, more: list[int], is_computed: bool) -> None:
        namespace, tokens = self.prompts[pick % len(self.prompts)]
        self.open_prompt(id_, namespace, tokens + more, is_computed=is_computed)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=small, token=tokens_below_two)
    def close_and_reopen(self, pick: int, token: int) -> None:
        """The next turn of a conversation: whatever is still cached must be hit."""
        id_ = self.any_id(pick)
        sequence = self.model.sequences[id_]
        namespace, tokens = NAMESPACES.index(sequence.namespace), [*sequence.tokens, token]
        self.close(pick)
        self.open_prompt(id_, namespace, tokens, is_computed=True)

    @precondition(lambda self: self.prompts)
    @rule(pick=small, shift=st.integers(1, 2), first=small, second=small)
    def open_under_two_namespaces(self, pick: int, shift: int, first: int, second: int) -> None:
        namespace, tokens = self.prompts[pick % len(self.prompts)]
        self.open_prompt(first, namespace, tokens, is_computed=True)
        self.open_prompt(second, (namespace + shift) % 3, tokens, is_computed=True)

    @precondition(lambda self: self.prompts)
    @rule(pick=small, first=small, second=small, tokens=st.lists(tokens_below_two, max_size=4), in_batch=st.booleans())
    def open_twice_before_computing(
        self, pick: int, first: int, second: int, tokens: list[int], in_batch: bool
    ) -> None:
        """Both compute the same blocks; one of them names nothing, and goes on naming nothing."""
        namespace, prompt = self.prompts[pick % len(self.prompts)]
        fresh = [id_ for id_ in dict.fromkeys((first, second)) if id_ not in self.model.sequences]
        for id_ in fresh:
            self.open_prompt(id_, namespace, prompt, is_computed=False)
        if in_batch and fresh and all(self.model.sequences[id_].num_pending == 1 for id_ in fresh):
            self.append_batch(fresh, is_single=True)
        for id_ in fresh:
            self.append_tokens(id_, self.model.sequences[id_].num_pending)
        for id_ in reversed(fresh):
            self.extend_tokens(id_, tokens)
            self.append_tokens(id_, self.model.sequences[id_].num_pending)

    @precondition(lambda self: self.prompts and len(self.pins) < MAX_PINS)
    @rule(pick=small, namespace=namespace_idx, more=st.lists(tokens_below_two, max_size=2))
    def pin(self, pick: int, namespace: int, more: list[int]) -> None:
        own_namespace, tokens = self.prompts[pick % len(self.prompts)]
        chosen = own_namespace if namespace == 0 else namespace
        salt, adapter = NAMESPACES[chosen]
        pinned = self.model.look_up(NAMESPACES[chosen], tokens + more)
        hit = self.manager.lookup(tokens + more, salt=salt, adapter=adapter)
        self.pins.append((hit, pinned))
        expect("blocks pinned", hit.block_ids.tolist(), pinned.blocks)

    @precondition(lambda self: self.pins)
    @rule(pick=small, id_=small)
    def open_pin(self, pick: int, id_: int) -> None:
        hit, pinned = self.pins[pick % len(self.pins)]
        if id_ in self.model.sequences:
            self.refused(DuplicateIdError, lambda: self.manager.open(id_, hit))
            return
        self.pins.remove((hit, pinned))
        expect("tokens hit", self.manager.open(id_, hit), pinned.num_computed)
        self.admit(id_, pinned)
        self.refused(BlockStateError, hit.drop)

    @precondition(lambda self: self.pins)
    @rule(pick=small)
    def drop_pin(self, pick: int) -> None:
        hit, pinned = self.pins.pop(pick % len(self.pins))
        self.model.let_go(pinned.blocks)
        hit.drop()
        self.refused(BlockStateError, hit.drop)
        self.refused(BlockStateError, lambda: self.manager.open("fresh", hit))

    @precondition(lambda self: self.model.sequences)
    @rule(pick=small)
    def close(self, pick: int) -> None:
        id_ = self.any_id(pick)
        self.close_sequence(id_)
        self.refused(UnknownIdError, lambda: self.manager.close(id_))

    @rule()
    def reset_prefix_cache(self) -> None:
        is_idle = not any(self.model.num_holders)
        if not is_idle:
            self.unchanged(lambda: expect("reset", self.manager.reset_prefix_cache(), False))
            return
        expect("reset", self.manager.reset_prefix_cache(), True)
        order = self.manager.memory.pool.order()
        expect("blocks after a reset", sorted(order), list(range(self.model.num_blocks)))
        # The order among blocks that were cached is nobody's business: take it as it is.
        self.model.free, self.model.evictable = order[::-1], []
        self.model.block_of.clear()
        self.model.name_of.clear()

    # Growing, sharing, shrinking

    @precondition(lambda self: self.on_device())
    @rule(pick=small)
    def append_all(self, pick: int) -> None:
        id_ = self.device_id(pick)
        self.append_tokens(id_, self.model.sequences[id_].num_pending)

    @rule(id_=small, num_spared=st.integers(0, 2))
    def crowd(self, id_: int, num_spared: int) -> None:
        """A sequence that shares nothing and takes all blocks but a few."""
        self.num_crowds += 1
        num_tokens = (self.model.num_available() - num_spared) * self.block_size
        if id_ not in self.model.sequences and num_tokens > 0:
            self.open_prompt(id_, 0, [1 + self.num_crowds] * num_tokens, is_computed=True)

    @precondition(lambda self: self.on_device())
    @rule(pick=small, num_tokens=st.integers(0, 6))
    def append_some(self, pick: int, num_tokens: int) -> None:
        id_ = self.device_id(pick)
        if num_tokens > self.model.sequences[id_].num_pending:
            self.refused(InvalidArgumentError, lambda: self.manager.try_append(id_, num_tokens))
        else:
            self.append_tokens(id_, num_tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=small, tokens=st.lists(tokens_below_two, max_size=5))
    def extend(self, pick: int, tokens: list[int]) -> None:
        self.extend_tokens(self.any_id(pick), tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=small)
    def read_tokens(self, pick: int) -> None:
        """All known tokens, those of the block that is being filled too."""
        id_ = self.any_id(pick)
        tokens, row = self.model.sequences[id_].tokens, np.array([self.manager.row(id_)])
        found = self.manager.memory.tokens.packed(row, np.array([0]), np.array([len(tokens)])).tolist()
        expect("known tokens", found, tokens)

    @precondition(lambda self: self.on_device())
    @rule(pick=small, token=tokens_below_two)
    def decode(self, pick: int, token: int) -> None:
        id_ = self.device_id(pick)
        self.extend_tokens(id_, [token])
        self.append_tokens(id_, self.model.sequences[id_].num_pending)

    @precondition(lambda self: self.on_device())
    @rule(token=tokens_below_two, is_reversed=st.booleans(), is_single=st.booleans())
    def decode_batch(self, token: int, is_reversed: bool, is_single: bool) -> None:
        """One more token for every sequence on the device that is up to date, as a scheduler appends them."""
        ids = [id_ for id_ in self.on_device() if self.model.sequences[id_].num_pending <= 1]
        for id_ in ids:
            if self.model.sequences[id_].num_pending == 0:
                self.extend_tokens(id_, [token])
        if is_reversed:
            ids.reverse()
        if ids:
            self.append_batch(ids, is_single=is_single)

    @precondition(lambda self: self.on_device())
    @rule(pick=small, id_=small)
    def fork(self, pick: int, id_: int) -> None:
        self.fork_sequence(self.device_id(pick), id_)

    @precondition(lambda self: self.on_device())
    @rule(
        pick=small,
        id_=small,
        tokens=st.lists(tokens_below_two, min_size=2, max_size=2),
        in_batch=st.sampled_from((True, True, False)),
    )
    def fork_and_write_both(self, pick: int, id_: int, tokens: list[int], in_batch: bool) -> None:
        """Fork in the middle of a block, where there is one, and let both halves go on."""
        source = self.device_id(pick)
        if len(self.model.sequences[source].tokens) % self.block_size == 0:
            self.extend_tokens(source, [0])
        self.append_tokens(source, self.model.sequences[source].num_pending)
        if id_ in self.model.sequences and id_ != source:
            self.close_sequence(id_)
        if not self.fork_sequence(source, id_):
            return
        both = [source, id_]
        for one, token in zip(both, tokens, strict=True):
            self.extend_tokens(one, [token])
        if in_batch and self.model.sequences[source].num_pending == 1:
            self.append_batch(both, is_single=tokens[0] == 0)
        else:
            for one in both:
                self.append_tokens(one, self.model.sequences[one].num_pending)

    @precondition(lambda self: self.on_device())
    @rule(pick=small, num_dropped=st.integers(0, 9))
    def truncate(self, pick: int, num_dropped: int) -> None:
        id_ = self.device_id(pick)
        self.truncate_sequence(id_, max(1, len(self.model.sequences[id_].tokens) - num_dropped))

    @precondition(lambda self: self.on_device())
    @rule(pick=small, num_dropped=st.integers(1, 3), tokens=st.lists(tokens_below_two, min_size=1, max_size=4))
    def reject_and_decode(self, pick: int, num_dropped: int, tokens: list[int]) -> None:
        id_ = self.device_id(pick)
        self.truncate_sequence(id_, max(1, len(self.model.sequences[id_].tokens) - num_dropped))
        self.extend_tokens(id_, tokens)
        self.append_tokens(id_, self.model.sequences[id_].num_pending)

    # Swapping

    @precondition(lambda self: self.on_device())
    @rule(pick=small)
    def swap_out(self, pick: int) -> None:
        id_ = self.device_id(pick)
        sequence = self.model.sequences[id_]
        if len(sequence.blocks) > self.model.num_free_host:
            self.refused(OutOfBlocksError, lambda: self.manager.swap_out(id_))
            return
        copies = self.manager.swap_out(id_)
        targets = copies.targets.tolist()
        taken = {block for other in self.model.sequences.values() for block in other.host_blocks or ()}
        expect("swapped blocks", copies.sources.tolist(), sequence.blocks)
        expect("distinct free host blocks", len(set(targets) - taken), len(sequence.blocks))
        self.copy_blocks(copies, self.device, self.host)
        self.model.swap_out(sequence, targets)

    @precondition(lambda self: self.on_device())
    @rule(pick=small, id_=small, num_spared=st.sampled_from((None, None, 0, 1, 2)), makes_room=st.booleans())
    def swap_out_crowd_and_swap_in(self, pick: int, id_: int, num_spared: int | None, makes_room: bool) -> None:
        """Half of the sequence's blocks are left in the cache, unless a number is drawn."""
        swapped = self.device_id(pick)
        half = (len(self.model.sequences[swapped].blocks) + 1) // 2
        self.swap_out(pick)
        if self.model.sequences[swapped].host_blocks is None:
            return
        if id_ in self.model.sequences and id_ != swapped:
            self.close_sequence(id_)
        self.crowd(id_, half if num_spared is None else num_spared)
        if makes_room and id_ in self.on_device():
            self.close_sequence(id_)
        self.swap_in_sequence(swapped)

    @precondition(lambda self: len(self.on_device()) < len(self.model.sequences))
    @rule(pick=small)
    def swap_in(self, pick: int) -> None:
        swapped = [id_ for id_, sequence in self.model.sequences.items() if sequence.host_blocks is not None]
        self.swap_in_sequence(swapped[pick % len(swapped)])

    def swap_in_sequence(self, id_: object) -> None:
        for call in (
            lambda: self.manager.append(id_, 0),
            lambda: self.manager.truncate(id_, 1),
            lambda: self.manager.fork(id_, "fresh"),
            lambda: self.manager.swap_out(id_),
        ):
            self.refused(InvalidArgumentError, call)
        expected = self.model.swap_in(self.model.sequences[id_])
        if expected is None:
            self.refused(OutOfBlocksError, lambda: self.manager.swap_in(id_))
            return
        copies = self.manager.swap_in(id_)
        expect("blocks swapped in", list(zip(copies.sources.tolist(), copies.targets.tolist(), strict=True)), expected)
        self.copy_blocks(copies, self.host, self.device)

    # The caller's mistakes

    @rule(data=st.data())
    def make_a_mistake(self, data: st.DataObject) -> None:
        mistake = data.draw(st.sampled_from((self.misname, self.miscount, self.misprompt)))
        mistake(data)

    def misname(self, data: st.DataObject) -> None:
        """An id that was never opened."""
        id_ = data.draw(st.sampled_from((99, "unknown", (), None)))
        arguments = {"append": (1,), "extend": ([1],), "fork": ("fresh",), "truncate": (1,)}
        for verb in ("append", "extend", "fork", "truncate", "swap_out", "swap_in", "close", "row"):
            self.refused(UnknownIdError, lambda verb=verb: getattr(self.manager, verb)(id_, *arguments.get(verb, ())))

    def miscount(self, data: st.DataObject) -> None:
        """A number that is none, or out of range."""
        bad = data.draw(st.sampled_from((-1, 2**63, 2**70, 1.0, float("nan"), True, None, "1")))
        if not self.on_device():
            return
        id_ = self.device_id(0)
        self.refused(InvalidArgumentError, lambda: self.manager.append(id_, bad))
        self.refused(InvalidArgumentError, lambda: self.manager.truncate(id_, bad))
        self.refused(InvalidArgumentError, lambda: self.manager.truncate(id_, 0))
        self.refused(InvalidArgumentError, lambda: self.manager.extend(id_, [bad]))
        self.refused(InvalidArgumentError, lambda: self.manager.swap_in(id_))

    def misprompt(self, data: st.DataObject) -> None:
        """A prompt or a namespace that is none."""
        bad = data.draw(st.sampled_from(([], [-1], [2**31], [0.5], [None], "", 7, None, [[1], [1, 2]], [[1, 2]])))
        self.refused(InvalidArgumentError, lambda: self.manager.open("fresh", bad))
        more = data.draw(st.sampled_from(({"salt": bytes(65)}, {"salt": "x"}, {"adapter": b"x"}, {"extras": ("x",)})))
        self.refused(InvalidArgumentError, lambda: self.manager.open("fresh", [1, 2, 3], **more))

    # What must hold after each step

    @invariant()
    def the_recount_agrees(self) -> None:
        self.manager.check_invariants()

    @invariant()
    def the_model_agrees(self) -> None:
        manager, model = self.manager, self.model
        pool = manager.memory.pool
        expect("blocks in the order in which they go out", pool.order(), model.free[::-1] + model.evictable)
        ids = np.arange(model.num_blocks, dtype=np.int32)
        expect("holders", pool.counts(ids).tolist(), model.num_holders)
        manager.memory.naming.catch_up()  # The model names blocks at once.
        expect("named blocks", np.flatnonzero(pool.is_named(ids)).tolist(), sorted(model.name_of))
        expect("open sequences", len(manager), len(model.sequences))
        for id_, sequence in model.sequences.items():
            expect("block table", manager.block_table(id_).tolist(), sequence.blocks)
            expect("tokens computed", manager.num_computed(id_), sequence.num_computed)
        statistics = manager.statistics()
        on_device = [sequence for sequence in model.sequences.values() if sequence.host_blocks is None]
        expect(
            "statistics",
            (
                statistics.num_used,
                statistics.num_evictable,
                statistics.num_free,
                statistics.num_host_used,
                statistics.num_slots,
                statistics.num_tokens,
                statistics.num_sequences,
            ),
            (
                model.num_blocks - model.num_available(),
                len(model.evictable),
                len(model.free),
                self.num_host_blocks - model.num_free_host,
                sum(len(sequence.blocks) for sequence in on_device) * self.block_size,
                sum(sequence.num_computed for sequence in on_device),
                len(model.sequences),
            ),
        )
        prefix = statistics.prefix
        expect(
            "lookups counted",
            (prefix.num_queries, prefix.queried_tokens, prefix.hit_tokens),
            (self.num_queries, self.queried_tokens, self.hit_tokens),
        )

    @invariant()
    def every_sequence_reads_what_was_written_for_it(self) -> None:
        size = self.block_size
        for id_, sequence in self.model.sequences.items():
            is_swapped = sequence.host_blocks is not None
            storage = self.host if is_swapped else self.device
            blocks = sequence.host_blocks if is_swapped else self.manager.block_table(id_).tolist()
            for position in range(sequence.num_computed):
                found = storage.get(blocks[position // size] * size + position % size)
                if found != sequence.name(position + 1):
                    raise AssertionError(f"sequence {id_} reads {found} at position {position} of {sequence}")

    def teardown(self) -> None:
        """Empty the memory: every block must be available again."""
        if not hasattr(self, "manager") or sys.exc_info()[0] is not None:  # What failed already is the news.
            return
        for hit, _ in self.pins:
            hit.drop()
        for id_ in list(self.model.sequences):
            self.manager.close(id_)
        statistics = self.manager.statistics()
        self.manager.check_invariants()
        left = (statistics.num_used, statistics.num_host_used, statistics.num_sequences)
        expect("blocks and sequences left", left, (0, 0, 0))

    # Both sides of one verb

    def on_device(self) -> list[object]:
        return [id_ for id_, sequence in self.model.sequences.items() if sequence.host_blocks is None]

    def device_id(self, pick: int) -> object:
        ids = self.on_device()
        return ids[pick % len(ids)]

    def any_id(self, pick: int) -> object:
        return list(self.model.sequences)[pick % len(self.model.sequences)]

    def open_prompt(self, id_: int, namespace: int, tokens: list[int], *, is_computed: bool) -> None:
        salt, adapter = NAMESPACES[namespace]
        if id_ in self.model.sequences:
            self.refused(DuplicateIdError, lambda: self.manager.open(id_, tokens, salt=salt, adapter=adapter))
            return
        sequence = self.model.look_up(NAMESPACES[namespace], tokens)
        num_hit = self.manager.open(id_, tokens, salt=salt, adapter=adapter)
        expect("tokens hit", num_hit, sequence.num_computed)
        self.admit(id_, sequence)
        if (namespace, tokens) not in self.prompts:
            self.prompts = [*self.prompts[-4:], (namespace, tokens)]
        if is_computed:
            self.append_tokens(id_, sequence.num_pending)

    def admit(self, id_: int, sequence: ModelSequence) -> None:
        self.model.sequences[id_] = sequence
        self.num_queries += 1
        self.queried_tokens += len(sequence.tokens)
        self.hit_tokens += sequence.num_computed

    def close_sequence(self, id_: object) -> None:
        self.model.close(id_)
        self.manager.close(id_)

    def extend_tokens(self, id_: object, tokens: list[int]) -> None:
        self.model.sequences[id_].tokens += tokens
        self.manager.extend(id_, tokens)

    def append_tokens(self, id_: object, num_tokens: int) -> None:
        sequence = self.model.sequences[id_]
        start = sequence.num_computed
        num_available = self.model.num_available()
        expected = self.model.append([(sequence, num_tokens)])
        if expected is None:
            self.unchanged(lambda: expect("try_append", self.manager.try_append(id_, num_tokens), None))
            row, try_append_run = self.manager.row(id_), self.manager.memory.try_append_run
            self.unchanged(lambda: expect("try_append_run", try_append_run(row, num_tokens), None))
            error = self.refused(OutOfBlocksError, lambda: self.manager.append(id_, num_tokens))
            expect("blocks that can be had", error.num_free, num_available)
            expect("more were requested", error.num_requested > num_available, True)
            return
        if self.appends_runs and num_tokens:
            self.append_run(id_, start, num_tokens, expected)
            return
        appended = self.manager.append(id_, num_tokens)
        self.copy_tails(appended.copies, expected)
        self.write(sequence, start, appended.slots.tolist())

    def append_run(self, id_: object, start: int, num_tokens: int, expected: list[tuple[int, int]]) -> None:
        """As a scheduler appends a chunk of a prompt: by row, unchecked, with a short cut of its own."""
        memory, row = self.manager.memory, self.manager.row(id_)
        self.copy_tails(memory.try_append_run(row, num_tokens), expected)
        positions = np.arange(start, start + num_tokens)
        slots = memory.sequences.slots(np.full(num_tokens, row), positions).tolist()
        self.write(self.model.sequences[id_], start, slots)

    def append_batch(self, ids: list[object], *, is_single: bool) -> None:
        memory = self.manager.memory
        sequences = [self.model.sequences[id_] for id_ in ids]
        starts = [sequence.num_computed for sequence in sequences]
        rows = np.array([self.manager.row(id_) for id_ in ids])
        expected = self.model.append([(sequence, 1) for sequence in sequences])

        def append() -> object:
            if is_single:
                return memory.try_append_single(rows, memory.sequences.num_computed[rows])
            return memory.try_append(rows, np.ones(len(ids), np.int64))

        if expected is None:
            self.unchanged(lambda: expect("appending to rows", append(), None))
            return
        self.copy_tails(append(), expected)
        slots = memory.sequences.slots(rows, np.array(starts)).tolist()
        for sequence, start, slot in zip(sequences, starts, slots, strict=True):
            self.write(sequence, start, [slot])

    def fork_sequence(self, source: object, id_: int) -> bool:
        if id_ in self.model.sequences:
            self.refused(DuplicateIdError, lambda: self.manager.fork(source, id_))
            return False
        self.model.sequences[id_] = self.model.fork(self.model.sequences[source])
        self.manager.fork(source, id_)
        return True

    def truncate_sequence(self, id_: object, num_tokens: int) -> None:
        sequence = self.model.sequences[id_]
        self.refused(InvalidArgumentError, lambda: self.manager.truncate(id_, len(sequence.tokens) + 1))
        self.model.truncate(sequence, num_tokens)
        self.manager.truncate(id_, num_tokens)

    def write(self, sequence: ModelSequence, start: int, slots: list[int]) -> None:
        expect("tokens with slots", start + len(slots), sequence.num_computed)
        for position, slot in enumerate(slots, start):
            self.device[slot] = sequence.name(position + 1)

    def copy_tails(self, copies: object, expected: list[tuple[int, int]]) -> None:
        if copies is None:
            raise AssertionError("blocks for these rows can be had, and were refused")
        expect("copies on write", list(zip(copies.sources.tolist(), copies.targets.tolist(), strict=True)), expected)
        self.copy_blocks(copies, self.device, self.device)

    def copy_blocks(self, copies: object, source: dict[int, object], target: dict[int, object]) -> None:
        for from_block, to_block in zip(copies.sources.tolist(), copies.targets.tolist(), strict=True):
            for offset in range(self.block_size):
                target[to_block * self.block_size + offset] = source.get(from_block * self.block_size + offset)

    def unchanged(self, call: Callable[[], object]) -> None:
        before = digest(self.manager)
        call()
        expect("state after nothing should have changed", digest(self.manager), before)

    def refused(self, kind: type[Exception], call: Callable[[], object]) -> Exception:
        """Carry out a call that must raise exactly `kind` and leave everything as it was; returns the error."""
        before = digest(self.manager)
        try:
            call()
        except kind as error:
            expect("type of the error", type(error), kind)
            expect(f"state after {kind.__name__}", digest(self.manager), before)
            return error
        raise AssertionError(f"{kind.__name__} expected, nothing raised")
