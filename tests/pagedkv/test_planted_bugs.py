"""Bugs of one line, planted into the real code: each must make the state machine or the recount fail.

A bug replaces a piece of the source of one function. If that piece is no longer there, the test fails and says so:
plant the bug anew in the code as it is then. `pytest -s` shows the table of what caught each bug.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test
from memory_machine import MemoryMachine

from pagedkv import manager as manager_module
from pagedkv.block_pool import BlockPool
from pagedkv.content import TokenContent
from pagedkv.eviction.lru import LRU
from pagedkv.known_tokens import KnownTokens
from pagedkv.manager import KVCacheManager
from pagedkv.naming import BlockNaming
from pagedkv.prefix_cache import PrefixCache
from pagedkv.row_memory import RowMemory
from pagedkv.shared_tails import SharedTails

# Without shrinking: a mutant needs a verdict, not a small example.
QUICK = settings(
    max_examples=600,
    stateful_step_count=50,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
    derandomize=True,
    database=None,
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Bug:
    owner: object
    function: str
    found: str
    planted: str


BUGS = {
    # Pools
    "an exact fit is refused": Bug(
        BlockPool, "try_allocate", "num_blocks > num_free + len(self.policy)", "num_blocks >= num_free + len(self.policy)"
    ),
    "a freed run goes out in descending order": Bug(BlockPool, "_free_up", "] = block_ids", "] = block_ids[::-1]"),
    "a new holder is not counted": Bug(BlockPool, "acquire", "before + HOLDER", "before"),
    "a hit block stays evictable": Bug(BlockPool, "acquire", "if lowest == NAMED:", "if False:"),
    "a named block is freed at once": Bug(
        BlockPool,
        "release",
        "highest == HOLDER else block_ids[before == HOLDER]",
        "highest <= HOLDER + NAMED else block_ids[before <= HOLDER + NAMED]",
    ),
    "eviction goes from the newest": Bug(
        LRU,
        "evict",
        "head = self._head",
        "newest = np.array(list(self.order())[::-1][:num_blocks], np.int32); self.remove(newest); return newest\n"
        "    head = self._head",
    ),
    "holes in the queue are not counted": Bug(LRU, "remove", "self._num_holes += len(block_ids)", "pass"),
    "holes that were cut off are not uncounted": Bug(LRU, "evict", "self._num_holes -= cut - num_blocks", "pass"),
    # Names
    "nothing is ever hit": Bug(RowMemory, "num_hit_blocks", "not self.caches_prefixes or", "self.caches_prefixes or"),
    "a hit may cover the whole prompt": Bug(RowMemory, "num_hit_blocks", "(num_known - 1)", "num_known"),
    "the salt does not enter the key": Bug(manager_module, "root_key", "+ _field(salt)", "+ _field(b'')"),
    "the adapter does not enter the key": Bug(manager_module, "root_key", "+ adapter_field", ""),
    "keys do not chain": Bug(
        TokenContent, "keys", "parent = keys[-1] if keys else self._root", "parent = self._root"
    ),
    "an evicted block keeps its name": Bug(PrefixCache, "_forget", "del block_of[key]", "pass"),
    "eviction is not reported": Bug(BlockPool, "_evict", "self.on_evict(block_ids)", "pass"),
    "a duplicate takes the name over": Bug(
        PrefixCache, "name_chain", "if not self._block_of.keys().isdisjoint(keys):", "if False:"
    ),
    "a duplicate goes on naming": Bug(PrefixCache, "name_chain", "return 0", "return 1"),
    "of a longer prefix only half is found": Bug(
        PrefixCache, "num_resident", "(low + high + 1) // 2", "high // 2 or 1; high = middle"
    ),
    "names survive a change of tokens": Bug(
        TokenContent, "write", "del self._keys[start // self._block_bytes :]", "pass"
    ),
    "a block is named before it is full": Bug(
        BlockNaming, "name_filled", "stops // table.block_size", "-(-stops // table.block_size)"
    ),
    "a lookup does not pin": Bug(KVCacheManager, "lookup", "self.memory.pool.acquire(block_ids)", "pass"),
    "dropping a hit forgets its blocks": Bug(KVCacheManager, "_drop", "hit.block_ids[::-1]", "hit.block_ids[:0]"),
    # Sequences
    "a duplicate id overwrites": Bug(KVCacheManager, "open", "if sequence_id in self._row_of:", "if False:"),
    "a fork onto a live id overwrites": Bug(KVCacheManager, "fork", "if sequence_id in self._row_of:", "if False:"),
    "closing forgets one block": Bug(RowMemory, "close", "table.blocks(row)[::-1]", "table.blocks(row)[:0:-1]"),
    "closing lets the head go first": Bug(RowMemory, "close", "table.blocks(row)[::-1]", "table.blocks(row)"),
    "closing forgets the host blocks": Bug(RowMemory, "close", "self.host_pool.release(host_blocks)", "pass"),
    "a fork does not hold its blocks": Bug(RowMemory, "fork", "self.pool.acquire(block_ids)", "pass"),
    "a fork's child writes in place": Bug(RowMemory, "fork", "self.shared_tails.mark(child)", "pass"),
    "a fork's parent writes in place": Bug(RowMemory, "fork", "self.shared_tails.mark(row)", "pass"),
    "copies only beyond two holders": Bug(SharedTails, "rows_to_copy", "num_holders > 1", "num_holders > 2"),
    "copies although nobody shares": Bug(SharedTails, "rows_to_copy", "num_holders > 1", "num_holders > 0"),
    "writes into a named block": Bug(SharedTails, "rows_to_copy", "or self._pool.has_name(block_id)", ""),
    "in a batch the last holder copies too": Bug(
        SharedTails, "rows_to_copy", "holders[block_id] = num_holders - 1", "holders[block_id] = num_holders"
    ),
    "the source of a copy stays held": Bug(SharedTails, "copy", "self._pool.release(sources[i : i + 1])", "pass"),
    "copies go the wrong way": Bug(
        SharedTails, "copy", "BlockCopies(sources, targets)", "BlockCopies(targets, sources)"
    ),
    "truncating keeps a block": Bug(
        RowMemory, "retract", "num_kept = cdiv(num_computed, self.block_size)", "num_kept = num_computed // self.block_size + 1"
    ),
    "truncating forgets that the tail has a name": Bug(
        RowMemory, "retract", "if num_computed % self.block_size:", "if False:"
    ),
    "truncating keeps counting named blocks": Bug(
        RowMemory, "retract", "min(int(table.num_named[row]), num_computed // self.block_size)", "table.num_named[row]"
    ),
    # The short cuts of a scheduler
    "single tokens are written into shared tails": Bug(
        RowMemory, "try_append_single", "if self.shared_tails.num_marked:", "if False:"
    ),
    "a run is written into a shared tail": Bug(
        RowMemory, "try_append_run", "if table.has_shared_tail[row]:", "if False:"
    ),
    "a run off the named chain is named": Bug(
        RowMemory, "try_append_run", "table.num_named[row] == first", "True"
    ),
    "the tail of a run is forgotten": Bug(
        KnownTokens, "extend_run", "self.load_tail(row, num_known + num_new)", "pass"
    ),
    # Swapping
    "swapped in reversed": Bug(
        RowMemory, "try_swap_in", "BlockCopies(host_blocks[num_hits:]", "BlockCopies(host_blocks[num_hits:][::-1]"
    ),
    "swapped in from the head despite hits": Bug(
        RowMemory, "try_swap_in", "BlockCopies(host_blocks[num_hits:]", "BlockCopies(host_blocks[: len(new_blocks)]"
    ),
    "hits of a swap in are counted as new": Bug(
        RowMemory, "try_swap_in", "+ self.pool.num_evictable_among(hits) >", "+ num_hits >"
    ),
    "host blocks stay held after a swap in": Bug(
        RowMemory, "try_swap_in", "self.host_pool.release(self.host_blocks.pop(row))", "self.host_blocks.pop(row)"
    ),
    "swapped out blocks stay held": Bug(RowMemory, "try_swap_out", "self.pool.release(device_blocks[::-1])", "pass"),
}  # fmt: skip


# Read once, so that editing the code during a run shifts no lines.
SOURCES = {bug: textwrap.dedent(inspect.getsource(getattr(bug.owner, bug.function))) for bug in BUGS.values()}


def plant(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    function, source = getattr(bug.owner, bug.function), SOURCES[bug]
    if source.count(bug.found) != 1:
        pytest.fail(f"{bug.function} no longer holds {bug.found!r} once: plant this bug anew")
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(source.replace(bug.found, bug.planted), "<planted>", "exec"), namespace)  # noqa: S102 - our own source
    monkeypatch.setattr(bug.owner, bug.function, namespace[bug.function])


@pytest.fixture(scope="module")
def verdicts() -> Iterator[dict[str, str]]:
    """One line for each bug: what caught it. Printed at the end."""
    verdicts: dict[str, str] = {}
    yield verdicts
    width = max(map(len, verdicts), default=0)
    print(*("", *(f"{name:{width}}  {verdict}" for name, verdict in verdicts.items())), sep="\n")


@pytest.mark.parametrize("name", BUGS)
def test_the_machine_catches(name: str, verdicts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(BUGS[name], monkeypatch)
    try:
        run_state_machine_as_test(MemoryMachine, settings=QUICK)
    except Exception as error:  # noqa: BLE001 - whatever a planted bug causes
        message = str(error).splitlines()[0] if str(error) else ""
        verdicts[name] = f"{type(error).__name__}: {message}"[:150]
    else:
        verdicts[name] = "NOT CAUGHT"
        pytest.fail(f"nothing noticed that {name}")
