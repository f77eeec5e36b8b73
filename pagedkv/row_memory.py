"""The memory's verbs on rows: what a scheduler calls in every step, for many sequences at once."""

from __future__ import annotations

import numpy as np

from pagedkv.arrays import BlockIds, Int64s, Rows, cdiv
from pagedkv.block_pool import BlockPool
from pagedkv.config import CacheConfig
from pagedkv.content import Content, SimulatedContent
from pagedkv.draft_slots import DraftSlots
from pagedkv.eviction import EvictionPolicy
from pagedkv.known_tokens import KnownTokens
from pagedkv.leaps import Leaps
from pagedkv.naming import BlockNaming
from pagedkv.plans import NO_COPIES, BlockCopies
from pagedkv.prefix_cache import PrefixCache
from pagedkv.sequences import SequenceTable
from pagedkv.shared_tails import SharedTails
from pagedkv.statistics import PrefixCounters

__all__ = ["RowMemory"]


class RowMemory:
    """Two pools, a prefix cache and the table of live sequences, kept consistent by these verbs.

    Rows that are passed in must be live; nothing is validated here, so that a step costs a fixed number of array
    operations. KVCacheManager is the same memory with ids, validation and single sequences.

    Every live row holds exactly `cdiv(num_computed, block_size)` device blocks, or none while it is swapped out; with
    drafts in flight, as many as those need, too.
    Plans must be carried out in this order: swaps out, copies, swaps in, then the step's own writes.
    """

    __slots__ = (
        "_serial",
        "block_size",
        "cache",
        "caches_prefixes",
        "counters",
        "drafts",
        "host_blocks",
        "host_pool",
        "leaps",
        "naming",
        "pool",
        "sequences",
        "shared_tails",
        "tokens",
    )

    def __init__(self, config: CacheConfig, eviction: EvictionPolicy | None = None) -> None:
        self.block_size = config.block_size
        self.caches_prefixes = config.prefix_caching
        self.pool = BlockPool(config.num_blocks, eviction)
        self.host_pool = BlockPool(config.num_host_blocks)
        self.cache = PrefixCache(self.pool)
        self.sequences = SequenceTable(config.block_size)
        self.counters = PrefixCounters()
        self.host_blocks: dict[int, BlockIds] = {}
        self.tokens = KnownTokens(self.sequences)
        self.naming = BlockNaming(self.cache, self.sequences, self.tokens)
        self.shared_tails = SharedTails(self.pool, self.sequences)
        naming = self.naming if config.prefix_caching else None
        self.drafts = DraftSlots(self.pool, self.sequences, naming)
        self.leaps = Leaps(self.pool, self.sequences, self.shared_tails, naming)
        self._serial = 0

    def next_serial(self) -> int:
        """A number that no simulated content has yet."""
        self._serial += 1
        return self._serial

    # Opening and closing

    def num_hit_blocks(self, content: Content, num_known: int) -> int:
        """Blocks of the longest resident prefix, leaving at least one token to compute. Pins nothing. O(log n)."""
        num_keys = (num_known - 1) // self.block_size
        if not self.caches_prefixes or num_keys <= 0:
            return 0
        self.naming.catch_up()
        return self.cache.num_resident(content.keys(num_keys), num_keys)

    def hit_blocks(self, content: Content, num_hit: int) -> BlockIds:
        """The first `num_hit` blocks of the content, all resident. O(num_hit)."""
        return self.cache.blocks(content.keys(num_hit), num_hit) if num_hit else NO_COPIES.sources

    def open(self, content: Content, num_known: int, hit_blocks: BlockIds) -> int:
        """Make a row that holds the hit blocks, and return it. O(len(hit_blocks))."""
        row = self.adopt(content, num_known, hit_blocks)
        if len(hit_blocks):  # Last: nothing can fail once they are held.
            self.pool.acquire(hit_blocks)
        return row

    def adopt(self, content: Content, num_known: int, hit_blocks: BlockIds) -> int:
        """Make a row that takes over the caller's hold on the hit blocks."""
        table = self.sequences
        num_hit = len(hit_blocks)
        row = table.add(content, num_known, hit_blocks, num_hit * self.block_size)
        table.num_named[row] = num_hit
        self.tokens.load_tail(row, num_known)
        return row

    def close(self, row: int) -> None:
        """Let go of everything that the row holds, deepest block first; its content stays with the caller. O(blocks)."""
        table = self.sequences
        self.naming.catch_up()
        self.tokens.sync(row)
        host_blocks = self.host_blocks.pop(row, None)
        if host_blocks is not None:
            self.host_pool.release(host_blocks)
        else:
            self.pool.release(table.blocks(row)[::-1])
        self.shared_tails.unmark(row)
        table.remove(row)

    # Growing

    def try_append(self, rows: Rows, num_tokens: Int64s) -> BlockCopies | None:
        """Give the next `num_tokens[i]` known tokens of each row their slots, and name the blocks that they fill.

        Returns the copies on write to carry out first, or None, with nothing changed, if the blocks cannot be had.
        Blocks are handed out in the order of `rows`. O(rows + blocks), a fixed number of array operations; Python-level
        work only for rows that fill a block.
        """
        table = self.sequences
        starts = table.num_computed[rows]
        stops = starts + num_tokens
        num_blocks = -(-stops // self.block_size)
        num_new = num_blocks - table.num_blocks[rows]
        total = int(np.add.reduce(num_new))
        if total:
            table.reserve_width(int(np.maximum.reduce(num_blocks)))
        copied = self.shared_tails.rows_to_copy(rows, starts) if self.shared_tails.num_marked else []
        block_ids = self.pool.try_allocate(total + len(copied)) if total or copied else NO_COPIES.sources
        if block_ids is None:
            return None
        copies = (
            self.shared_tails.copy(rows, copied, block_ids[: len(copied)])
            if self.shared_tails.num_marked
            else NO_COPIES
        )
        if total:
            growing = num_new.nonzero()[0]
            table.append_blocks(rows[growing], num_new[growing], block_ids[len(copied) :])
        table.num_computed[rows] = stops
        if self.caches_prefixes:
            self.naming.name_filled(rows, starts, stops)
        return copies

    def try_append_single(self, rows: Rows, starts: Int64s) -> BlockCopies | None:
        """As `try_append` for one token each, given `starts`, the rows' `num_computed`: the steady state of decoding."""
        if self.shared_tails.num_marked:
            return self.try_append(rows, np.ones(len(rows), np.int64))
        table, block_size = self.sequences, self.block_size
        offsets = starts % block_size
        growing = (offsets == 0).nonzero()[0]
        if len(growing):
            table.reserve_width(int(np.maximum.reduce(starts[growing])) // block_size + 1)
            block_ids = self.pool.try_allocate(len(growing))
            if block_ids is None:
                return None
            table.append_single(rows[growing], block_ids)
        table.num_computed[rows] = starts + 1
        if self.caches_prefixes:
            filling = (offsets == block_size - 1).nonzero()[0]
            self.naming.defer(rows[filling], starts[filling] // block_size)
        return NO_COPIES

    def try_append_run(self, row: int, num_tokens: int) -> BlockCopies | None:
        """As `try_append` for many tokens of one row: a chunk of a prompt."""
        table, block_size = self.sequences, self.block_size
        if table.has_shared_tail[row]:
            return self.try_append(np.array([row]), np.array([num_tokens]))
        start, held = int(table.num_computed[row]), int(table.num_blocks[row])
        stop = start + num_tokens
        total = cdiv(stop, block_size)
        if total > held:
            table.reserve_width(total)
            block_ids = self.pool.try_allocate(total - held)
            if block_ids is None:
                return None
            table.append_run(row, held, block_ids)
        table.num_computed[row] = stop
        first, last = start // block_size, stop // block_size
        if self.caches_prefixes and last > first:
            self.naming.catch_up()
            if table.num_named[row] == first:
                self.naming.name_run(row, first, last)
        return NO_COPIES

    # Sharing

    def fork(self, row: int) -> int:
        """Make a row that shares every block of `row`; the first of them to write into a shared tail copies it. O(blocks)."""
        table = self.sequences
        self.naming.catch_up()
        content = self.tokens.sync(row)
        num_known, num_computed = int(table.num_known[row]), int(table.num_computed[row])
        block_ids = table.blocks(row)
        child_content: Content
        if isinstance(content, SimulatedContent):
            child_content = content.fork(num_known // self.block_size, self.next_serial())
        else:
            child_content = content.fork(num_known)
        child = table.add(child_content, num_known, block_ids, num_computed)
        self.pool.acquire(block_ids)
        table.num_named[child] = table.num_named[row]
        table.tails[child] = table.tails[row]
        if num_computed % self.block_size:
            self.shared_tails.mark(row)
            self.shared_tails.mark(child)
        return child

    # Shrinking

    def truncate(self, row: int, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on, computed or not, and the blocks that only they need. O(blocks dropped)."""
        table = self.sequences
        if num_tokens < table.num_known[row]:
            content = table.content(row)
            if isinstance(content, SimulatedContent):
                content.truncate(num_tokens // self.block_size, self.next_serial())
                table.name_bases[row] = content.base
            self.tokens.cut(row, num_tokens)
        if num_tokens < table.num_computed[row]:
            self.retract(row, num_tokens)

    def retract(self, row: int, num_computed: int) -> None:
        """Take the slots of the tokens from `num_computed` on away again; the tokens stay known. O(blocks dropped)."""
        self.naming.catch_up()
        table = self.sequences
        num_kept = cdiv(num_computed, self.block_size)
        self.pool.release(table.blocks(row)[num_kept:][::-1])
        table.num_blocks[row] = num_kept
        table.num_computed[row] = num_computed
        table.num_drafts[row] = 0
        table.num_named[row] = min(int(table.num_named[row]), num_computed // self.block_size)
        if num_computed % self.block_size:
            self.shared_tails.mark(row)
        else:
            self.shared_tails.unmark(row)

    # Swapping

    def try_swap_out(self, row: int) -> BlockCopies | None:
        """Move the row's blocks to the host pool. None, with nothing changed, if that has too few. O(blocks)."""
        table = self.sequences
        host_blocks = self.host_pool.try_allocate(int(table.num_blocks[row]))
        if host_blocks is None:
            return None
        self.naming.catch_up()
        device_blocks = table.blocks(row)
        self.pool.release(device_blocks[::-1])
        self.host_blocks[row] = host_blocks
        table.num_blocks[row] = 0
        table.num_named[row] = 0
        self.shared_tails.unmark(row)
        return BlockCopies(device_blocks, host_blocks)

    def resident_blocks(self, row: int) -> BlockIds:
        """What the prefix cache still has of the full blocks that a swapped row had on the device. O(blocks)."""
        content = self.sequences.content(row)
        num_full = int(self.sequences.num_computed[row]) // self.block_size
        if not self.caches_prefixes or num_full == 0:
            return NO_COPIES.sources
        self.naming.catch_up()
        return self.hit_blocks(content, self.cache.num_resident(content.keys(num_full), num_full))

    def num_blocks_to_swap_in(self, row: int, hits: BlockIds | None = None) -> int:
        """Blocks that must be available for `try_swap_in` to succeed: new ones, and hits that nobody holds. O(blocks)."""
        num_blocks = len(self.host_blocks[row])
        hits = self.resident_blocks(row) if hits is None else hits
        return num_blocks - len(hits) + self.pool.num_evictable_among(hits)

    def try_swap_in(self, row: int, hits: BlockIds | None = None) -> BlockCopies | None:
        """Bring the row's blocks back, taking those that the prefix cache still has instead of copying them.

        None, with nothing changed, if the blocks cannot be had. `hits`: the first of `resident_blocks`, all if None.
        O(blocks).
        """
        table = self.sequences
        host_blocks = self.host_blocks[row]
        hits = self.resident_blocks(row) if hits is None else hits
        num_hits = len(hits)
        if len(host_blocks) - num_hits + self.pool.num_evictable_among(hits) > self.pool.num_available:
            return None
        table.reserve_width(len(host_blocks))
        if num_hits:
            self.pool.acquire(hits)
        try:
            new_blocks = self.pool.allocate(len(host_blocks) - num_hits)
        except BaseException:
            self.pool.release(hits[::-1])
            raise
        self.host_pool.release(self.host_blocks.pop(row))
        one_row = np.array([row])
        table.append_blocks(one_row, np.array([len(host_blocks)]), np.concatenate((hits, new_blocks)))
        table.num_named[row] = num_hits
        if self.caches_prefixes:
            self.naming.name_filled(one_row, np.array([num_hits * self.block_size]), table.num_computed[one_row])
        return BlockCopies(host_blocks[num_hits:], new_blocks)

    # Steps

    def begin_step(self) -> None:
        """A step is being planned: what it names is remembered until `end_step`. Raises BlockStateError within another."""
        self.naming.begin_step()
        self.pool.taken = []

    def end_planning(self) -> list[BlockIds]:
        """The step is planned: returns the blocks that were handed out for it, call by call. Later ones are others'. O(1)."""
        taken, self.pool.taken = self.pool.taken, None
        return taken or []

    def end_step(self) -> None:
        """The step was carried out: what it named holds what its name says."""
        self.pool.taken = None
        self.naming.end_step()

    def unname_step(self) -> BlockIds:
        """The step failed: forget the names that it gave, since the blocks were never filled, and return the blocks."""
        self.pool.taken = None
        named = np.array(self.naming.take_back(), np.int64)
        self.cache.unname(named)
        return named
