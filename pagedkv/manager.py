"""The memory as people use it: sequences by id, every argument checked before anything changes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import BlockIds, Int32s, Int64s, as_int, as_token_ids, shown
from pagedkv.block_keys import ExtraKey, as_extras, root_key
from pagedkv.checks import CheckLevel, Checks, as_check_level
from pagedkv.config import CacheConfig, require_kind, require_object
from pagedkv.content import MAX_TOKENS, Content, SimulatedContent, SimulatedPrompt, TokenContent
from pagedkv.errors import (
    BlockStateError,
    DuplicateIdError,
    InvalidArgumentError,
    OutOfBlocksError,
    UnknownIdError,
)
from pagedkv.eviction import EvictionPolicy
from pagedkv.manager_step import ManagerStep
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.recount import check_memory
from pagedkv.row_memory import RowMemory
from pagedkv.statistics import MemoryStatistics

__all__ = ["Appended", "KVCacheManager", "PrefixHit", "Prompt"]

Prompt = Sequence[int] | Int32s | SimulatedPrompt
"""Token ids, or for simulation a length with the names of what it shares."""

# `append` is not among them: it calls `try_append`.
MOVING_VERBS = (
    "lookup",
    "open",
    "close",
    "try_append",
    "fork",
    "truncate",
    "swap_out",
    "swap_in",
    "reset_prefix_cache",
    "_drop",
)
"""Verbs that take blocks, let them go, or forget their names."""
CHANGING_VERBS = (*MOVING_VERBS, "extend")


class Appended(NamedTuple):
    """Where new tokens go, and what to copy first.

    slots:  (num_tokens,) int64, block_id * block_size + offset
    copies: blocks to copy on the device before anything is written
    """

    slots: Int64s
    copies: BlockCopies


class PrefixHit:
    """The longest resident prefix of a prompt, pinned: its blocks cannot be evicted until it is used or dropped.

    Pass it to `KVCacheManager.open`, which takes it over, or `drop` it; as a context manager it drops itself unless it
    was used. Doing either twice raises BlockStateError.
    """

    __slots__ = ("_manager", "block_ids", "content", "num_known", "num_tokens")

    def __init__(self, manager: KVCacheManager, content: Content, num_known: int, block_ids: BlockIds) -> None:
        self._manager: KVCacheManager | None = manager
        self.content = content
        self.num_known = num_known
        self.block_ids = block_ids
        self.num_tokens = len(block_ids) * manager.config.block_size

    def drop(self) -> None:
        """Let go of the blocks. O(blocks)."""
        self.take_over()._drop(self)

    def take_over(self, owner: KVCacheManager | None = None) -> KVCacheManager:
        """End the pin in favour of whoever calls; returns the manager that it belongs to, which is `owner` if given."""
        manager = self._manager
        if manager is None:
            raise BlockStateError("this prefix hit was used or dropped already")
        if owner is not None and manager is not owner:
            raise BlockStateError("this prefix hit belongs to another manager")
        self._manager = None
        return manager

    def return_to(self, manager: KVCacheManager) -> None:
        """Pin again what `take_over` has just handed over: nothing came of it."""
        self._manager = manager

    def __enter__(self) -> PrefixHit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._manager is not None:
            self.drop()


class KVCacheManager:
    """Block pool, prefix cache, block tables and swapping for sequences named by any hashable id.

    Each verb does all of its work, or raises and leaves the state as it was. A scheduler that plans many sequences a
    step calls `memory`, the same state by row.

    `check` says how much of itself the memory looks at after each operation, of its own or of a scheduler: "off",
    "cheap" (O(1), within 5 % of a step's or a call's cost) or "full" (a recount, for tests). A violation is raised.

    >>> manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
    >>> manager.open("a", [1, 2, 3, 4, 5])
    0
    >>> manager.append("a", 5).slots.tolist()
    [0, 1, 2, 3, 4]
    >>> manager.open("b", [1, 2, 3, 4, 9])  # two full blocks are there already
    4
    >>> manager.close("a"); manager.close("b")
    >>> manager.statistics().num_used
    0
    """

    def __init__(
        self, config: CacheConfig, *, eviction: EvictionPolicy | None = None, check: CheckLevel = "off"
    ) -> None:
        require_kind("config", config, CacheConfig)
        if eviction is not None:
            require_object("eviction", eviction, "evict", f"LRU({config.num_blocks})")
        self.config = config
        self.memory = RowMemory(config, eviction)
        self._plain_root = root_key(config.identity, config.block_size)
        self._row_of: dict[Hashable, int] = {}
        self._pinned: dict[int, PrefixHit] = {}
        self._step: ManagerStep | None = None
        level = as_check_level(check)
        self.checks = None if level == "off" else Checks(self.memory, level)
        """What looks at this memory after each operation, None if nothing does; a scheduler has itself watched, too."""
        if self.checks is not None:
            # To make tokens known moves no block, and is half of the calls of whoever decodes.
            verbs = MOVING_VERBS if level == "cheap" else CHANGING_VERBS
            self.checks.watch(self, verbs, self.check_invariants)

    # Opening and closing

    def make_content(
        self, prompt: Prompt, *, salt: bytes = b"", adapter: str | None = None, extras: Iterable[ExtraKey] = ()
    ) -> tuple[Content, int]:
        """Check a prompt and return what memory keeps of it, with its number of tokens. O(n), hashes nothing yet."""
        if self.config.requires_salt and not salt:
            raise InvalidArgumentError(
                "tenants share this memory (requires_salt): a sequence without a salt is refused, and so is a simulated "
                "prompt, which has none"
            )
        if isinstance(prompt, SimulatedPrompt):
            if salt or adapter is not None or tuple(extras):
                raise InvalidArgumentError(
                    "a simulated prompt takes no salt, adapter or extras: its ids say what it shares"
                )
            keys = prompt.block_keys(self.config.block_size)
            return SimulatedContent(keys, self.memory.next_serial()), prompt.num_tokens
        token_ids = as_token_ids("prompt", prompt)
        if not 1 <= len(token_ids) <= MAX_TOKENS:
            raise InvalidArgumentError(f"a prompt has 1 to {MAX_TOKENS} tokens, found {len(token_ids)}")
        root = self._plain_root
        if salt != b"" or adapter is not None:
            root = root_key(self.config.identity, self.config.block_size, salt=salt, adapter=adapter)
        return TokenContent(token_ids, self.config.block_size, root, as_extras(extras)), len(token_ids)

    def lookup(
        self, prompt: Prompt, *, salt: bytes = b"", adapter: str | None = None, extras: Iterable[ExtraKey] = ()
    ) -> PrefixHit:
        """Find and pin the longest resident prefix: whole blocks, at most `num_tokens - 1` tokens.

        O(log blocks) to find it, O(blocks hit) to pin it, after hashing the prompt.
        """
        content, num_known = self.make_content(prompt, salt=salt, adapter=adapter, extras=extras)
        block_ids = self._written_hits(content, num_known)
        self.memory.pool.acquire(block_ids)
        hit = PrefixHit(self, content, num_known, block_ids)
        self._pinned[id(hit)] = hit  # An identity as a key only: nothing is ordered or decided by it.
        return hit

    def open(
        self,
        sequence_id: Hashable,
        prompt: Prompt | PrefixHit,
        *,
        salt: bytes = b"",
        adapter: str | None = None,
        extras: Iterable[ExtraKey] = (),
    ) -> int:
        """Begin a sequence and return how many of its tokens are computed already (a prefix hit).

        No block is taken beyond the hit. `prompt` may be a PrefixHit, whose pin passes to the sequence.
        Raises DuplicateIdError, InvalidArgumentError.
        """
        _check_hashable(sequence_id)
        if sequence_id in self._row_of:
            raise DuplicateIdError(f"sequence {shown(sequence_id)} is open already")
        memory = self.memory
        if isinstance(prompt, PrefixHit):
            if salt or adapter is not None or tuple(extras):
                raise InvalidArgumentError("a prefix hit takes no salt, adapter or extras: its lookup had them")
            num_known, block_ids = prompt.num_known, prompt.block_ids
            row = self._adopt(prompt)
        else:
            content, num_known = self.make_content(prompt, salt=salt, adapter=adapter, extras=extras)
            block_ids = self._written_hits(content, num_known)
            row = memory.open(content, num_known, block_ids)
        memory.counters.record(num_known, len(block_ids), self.config.block_size)
        self._row_of[sequence_id] = row
        return len(block_ids) * self.config.block_size

    def close(self, sequence_id: Hashable) -> None:
        """End a sequence, swapped out or not. Its named blocks stay in the cache until they are evicted. O(blocks)."""
        row = self.row(sequence_id)
        self.memory.close(row)
        if self._step is not None:
            self._step.note_close(row)
        del self._row_of[sequence_id]

    # Growing, sharing, shrinking

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is appended inside is written when it ends: `with manager.step():` append, copy, run the model.

        If the body raises, all that was appended in it is taken back: the tokens are pending again, and blocks that they
        filled have no names, so that nobody hits what was never written. Nobody does before the end, either: `open` and
        `lookup` find what a step fills only after it. O(1), and O(blocks) if it fails.
        Raises BlockStateError within another step, of this manager or of a scheduler on the same memory.

        >>> import contextlib
        >>> manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2))
        >>> manager.open("a", [1, 2, 3, 4])
        0
        >>> with contextlib.suppress(RuntimeError), manager.step():
        ...     slots = manager.append("a", 4).slots
        ...     raise RuntimeError("the model failed")
        >>> manager.num_computed("a")
        0
        """
        step = self._step = ManagerStep(self.memory)
        try:
            yield
        except BaseException:
            self._step = None
            step.take_back()
            raise
        self._step = None
        step.end()

    def try_append(self, sequence_id: Hashable, num_tokens: int) -> Appended | None:
        """Give the next `num_tokens` known tokens their slots; None, with nothing changed, if blocks are short.

        O(num_tokens). Raises InvalidArgumentError beyond the known tokens: `extend` first.
        """
        row, memory = self._device_row(sequence_id), self.memory
        start = memory.sequences.num_computed.item(row)
        num_pending = memory.sequences.num_known.item(row) - start
        num_tokens = as_int("num_tokens", num_tokens, at_least=0, at_most=num_pending)
        if num_tokens == 0:  # Nothing is written, so a shared tail need not be copied.
            return Appended(np.empty(0, np.int64), NO_COPIES)
        if self._step is None:
            copies = memory.naming.apart(memory.try_append_run, row, num_tokens)
        else:
            copies = memory.try_append_run(row, num_tokens)
            if copies is not None:
                self._step.note_append(row, start, copies)
        if copies is None:
            return None
        return Appended(memory.sequences.slots_of_run(row, start, start + num_tokens), copies)

    def append(self, sequence_id: Hashable, num_tokens: int) -> Appended:
        """As `try_append`, but raises OutOfBlocksError, with nothing changed, if blocks are short."""
        appended = self.try_append(sequence_id, num_tokens)
        if appended is None:
            memory, rows = self.memory, np.array([self.row(sequence_id)])
            num_new = int(memory.sequences.num_blocks_to_append(rows, num_tokens)[0])
            num_copied = len(memory.shared_tails.rows_to_copy(rows, memory.sequences.num_computed[rows]))
            raise OutOfBlocksError(num_new + num_copied, memory.pool.num_available)
        return appended

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int] | int) -> None:
        """Add known tokens at the end: their ids, or for a simulated sequence their number. O(n)."""
        row, table = self.row(sequence_id), self.memory.sequences
        num_known = int(table.num_known[row])
        if isinstance(table.contents[row], SimulatedContent):
            num_new = as_int("token_ids", token_ids, at_least=0, at_most=MAX_TOKENS - num_known)
            table.num_known[row] = num_known + num_new
            return
        if isinstance(token_ids, int):
            raise InvalidArgumentError("a sequence of real tokens is extended by their ids, found a number")
        tokens = as_token_ids("token_ids", token_ids)
        as_int("tokens", num_known + len(tokens), at_least=1, at_most=MAX_TOKENS)
        self.memory.tokens.extend_run(row, tokens)

    def fork(self, source_id: Hashable, sequence_id: Hashable) -> None:
        """Begin a sequence that shares all blocks of another; whoever writes into a shared block first copies it. O(blocks)."""
        row = self._device_row(source_id)
        _check_hashable(sequence_id)
        if sequence_id in self._row_of:
            raise DuplicateIdError(f"sequence {shown(sequence_id)} is open already")
        child = self._row_of[sequence_id] = self.memory.fork(row)
        if self._step is not None:
            self._step.note_fork(row, child)

    def truncate(self, sequence_id: Hashable, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on (rejected drafts), and the blocks that only they needed. O(blocks dropped)."""
        row = self._device_row(sequence_id)
        num_known = int(self.memory.sequences.num_known[row])
        num_tokens = as_int("num_tokens", num_tokens, at_least=1, at_most=num_known)
        self.memory.truncate(row, num_tokens)
        if self._step is not None:
            self._step.note_truncation(row, num_tokens)

    # Swapping

    def swap_out(self, sequence_id: Hashable) -> BlockCopies:
        """Move a sequence's blocks to the host pool; returns the copies, device to host, to make before blocks are reused.

        Raises OutOfBlocksError, with nothing changed, if the host pool has too few; BlockStateError for a sequence that was
        appended to in the `step` under way, which is to be written first. O(blocks).
        """
        row = self._device_row(sequence_id)
        if self._step is not None and row in self._step:
            raise BlockStateError(
                f"sequence {shown(sequence_id)} has slots that this step is yet to write: swap it later"
            )
        copies = self.memory.try_swap_out(row)
        if copies is None:
            num_blocks = int(self.memory.sequences.num_blocks[row])
            raise OutOfBlocksError(num_blocks, self.memory.host_pool.num_available, "host")
        return copies

    def swap_in(self, sequence_id: Hashable) -> BlockCopies:
        """Bring a sequence back; returns the copies, host to device. Blocks still in the prefix cache are not copied.

        If it was brought back in a `step` that fails, the tokens of copied blocks are pending again.
        Raises OutOfBlocksError, with nothing changed, if the device pool has too few. O(blocks).
        """
        row = self.row(sequence_id)
        if row not in self.memory.host_blocks:
            raise InvalidArgumentError(f"sequence {shown(sequence_id)} is not swapped out")
        memory = self.memory
        hits = memory.naming.written(memory.resident_blocks(row))
        if self._step is None:
            copies = memory.naming.apart(memory.try_swap_in, row, hits)
        else:
            copies = memory.try_swap_in(row, hits)
            if copies is not None:
                # If the step fails, nobody knows whether these copies were made.
                self._step.note_append(row, len(hits) * self.config.block_size, copies)
        if copies is None:
            num_needed = memory.num_blocks_to_swap_in(row, hits)
            raise OutOfBlocksError(num_needed, memory.pool.num_available, "device")
        return copies

    # Looking

    def row(self, sequence_id: Hashable) -> int:
        """The sequence's row in the columnar tables. O(1). Raises UnknownIdError."""
        try:
            return self._row_of[sequence_id]
        except (KeyError, TypeError):  # TypeError: what cannot be hashed is no id.
            raise UnknownIdError(f"no open sequence {shown(sequence_id)}") from None

    def __contains__(self, sequence_id: Hashable) -> bool:
        return sequence_id in self._row_of

    def __len__(self) -> int:
        """Number of open sequences, swapped ones included. O(1)."""
        return len(self._row_of)

    def block_table(self, sequence_id: Hashable) -> BlockIds:
        """The sequence's blocks on the device, (num_blocks,) int64, a copy. O(blocks)."""
        return self.memory.sequences.blocks(self.row(sequence_id))

    def num_computed(self, sequence_id: Hashable) -> int:
        """Tokens of the sequence that have a slot. O(1)."""
        return int(self.memory.sequences.num_computed[self.row(sequence_id)])

    def statistics(self) -> MemoryStatistics:
        """Utilisation, fragmentation and hit rates now. O(rows)."""
        memory, table = self.memory, self.memory.sequences
        on_device = table.num_blocks > 0
        return MemoryStatistics(
            num_blocks=memory.pool.num_blocks,
            num_used=memory.pool.num_used,
            num_evictable=memory.pool.num_evictable,
            num_free=memory.pool.num_free,
            num_host_blocks=memory.host_pool.num_blocks,
            num_host_used=memory.host_pool.num_used,
            num_pinned=sum(len(hit.block_ids) for hit in self._pinned.values()),
            num_sequences=table.num_live,
            num_slots=int(table.num_blocks.sum()) * table.block_size,
            num_tokens=int(table.num_computed[on_device].sum()),
            prefix=replace(memory.counters),
        )

    def reset_prefix_cache(self) -> bool:
        """Forget every name, if no sequence holds a block; returns whether it did. O(named blocks)."""
        if self.memory.pool.num_used:
            return False
        self.memory.cache.clear()
        return True

    def check_invariants(self) -> None:
        """Recount everything from the tables. Raises InvariantViolation with the invariant's id. O(blocks + rows)."""
        pins = [hit.block_ids for hit in self._pinned.values()]
        check_memory(self.memory, pins)

    def _device_row(self, sequence_id: Hashable) -> int:
        row = self.row(sequence_id)
        if row in self.memory.host_blocks:
            raise InvalidArgumentError(f"sequence {shown(sequence_id)} is swapped out: swap it in first")
        return row

    def _written_hits(self, content: Content, num_known: int) -> BlockIds:
        """Blocks of the longest resident prefix of which every block is written: a step under way may yet fail."""
        memory = self.memory
        return memory.naming.written(memory.hit_blocks(content, memory.num_hit_blocks(content, num_known)))

    def _adopt(self, hit: PrefixHit) -> int:
        """Make a row that takes over the hit's pin."""
        hit.take_over(self)
        try:
            row = self.memory.adopt(hit.content, hit.num_known, hit.block_ids)
        except BaseException:
            hit.return_to(self)
            raise
        del self._pinned[id(hit)]
        return row

    def _drop(self, hit: PrefixHit) -> None:
        del self._pinned[id(hit)]
        self.memory.pool.release(hit.block_ids[::-1])


def _check_hashable(sequence_id: Hashable) -> None:
    try:
        hash(sequence_id)
    except TypeError:
        raise InvalidArgumentError(f"a sequence's id must be hashable, found {shown(sequence_id)}") from None
