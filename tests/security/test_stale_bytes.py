"""S5: what a request left in a block is readable by nobody, once the block was zeroed when freed or when taken."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pagedkv import CacheConfig, KVCacheManager, KVSpec  # noqa: E402
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig  # noqa: E402
from pagedkv.storage import KVStorage, Moves  # noqa: E402

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype="bfloat16", block_size=2)
CANARY = 0xA5


class Engine:
    """Keeps storage and bookkeeping in step as docs/storage.md asks: what left the tables is handed to `on_free`."""

    def __init__(self, zero_on: str | None, *, prefix_caching: bool = False, requires_salt: bool = False) -> None:
        config = CacheConfig(6, 2, 6, prefix_caching, requires_salt=requires_salt)
        self.manager = KVCacheManager(config)
        self.storage = KVStorage.for_cache(SPEC, config, zero_on=zero_on)

    def held(self) -> tuple[Counter[int], Counter[int]]:
        """Blocks on device and host that are not free: held, or named in the prefix cache."""
        memory = self.manager.memory
        ids = np.arange(6)
        kept = (memory.pool.counts(ids) > 0) | memory.pool.is_named(ids)
        return Counter(np.flatnonzero(kept).tolist()), Counter(np.flatnonzero(memory.host_pool.counts(ids)).tolist())

    def do(self, verb, *arguments):
        """Call the manager, carry its copies out, and tell storage what became free or was taken."""
        device, host = self.held()
        result = verb(*arguments)
        device_now, host_now = self.held()
        self.storage.on_alloc(np.array(sorted(device_now - device), np.int64))
        name = verb.__name__
        if name == "swap_out":
            self.storage.apply(Moves(swaps_out=result))
        elif name == "swap_in":
            self.storage.apply(Moves(swaps_in=result))
        elif name == "append":
            self.storage.apply(Moves(copies=result.copies))
        self.storage.on_free(np.array(sorted(device - device_now), np.int64))
        self.storage.on_free(np.array(sorted(host - host_now), np.int64), where="host")
        return result

    def write(self, sequence_id: str, num_tokens: int, byte: int) -> None:
        """Compute tokens: every byte of each of their slots is `byte`."""
        for slot in self.do(self.manager.append, sequence_id, num_tokens).slots.tolist():
            block, offset = divmod(slot, SPEC.block_size)
            for layer in range(SPEC.num_layers):
                for view in (self.storage.key_cache(layer), self.storage.value_cache(layer)):
                    view[block, offset] = torch.full((16,), byte, dtype=torch.uint8).view(torch.bfloat16)

    def bytes_of(self, block_ids: np.ndarray, where: str = "device") -> np.ndarray:
        return self.storage.read_blocks(block_ids, where=where).numpy()


def has_canary(raw: np.ndarray) -> bool:
    return bool((raw == CANARY).any())


def leave_canaries(engine: Engine) -> None:
    """A tenant fills, swaps out and in, copies on write, and leaves."""
    manager = engine.manager
    engine.do(manager.open, "a", [1, 2, 3, 4, 5])
    engine.write("a", 5, CANARY)
    engine.do(manager.swap_out, "a")
    engine.do(manager.swap_in, "a")
    engine.do(manager.fork, "a", "b")
    manager.extend("b", [6])
    engine.write("b", 1, CANARY)
    assert has_canary(engine.bytes_of(manager.block_table("a")))
    engine.do(manager.close, "a")
    engine.do(manager.close, "b")


def test_zeroed_when_freed_no_page_of_either_tier_keeps_a_canary() -> None:
    engine = Engine("free")
    leave_canaries(engine)

    assert not engine.bytes_of(np.arange(6)).any()
    assert not engine.bytes_of(np.arange(6), "host").any()


def test_zeroed_when_taken_the_next_owner_reads_zeros_in_slots_that_it_has_not_written() -> None:
    engine = Engine("alloc")
    leave_canaries(engine)
    engine.do(engine.manager.open, "next", [9] * 9)
    engine.write("next", 9, 0x11)

    assert set(engine.bytes_of(engine.manager.block_table("next")).ravel().tolist()) == {0x00, 0x11}


def test_never_zeroed_the_canary_is_found_so_the_scan_can_fail() -> None:
    engine = Engine("never")
    leave_canaries(engine)

    assert has_canary(engine.bytes_of(np.arange(6)))
    assert has_canary(engine.bytes_of(np.arange(6), "host"))


def test_with_prefix_caching_an_evicted_block_is_zeroed_when_it_is_taken() -> None:
    """A named block keeps its bytes for hits; "alloc" wipes it at eviction, which is when it is taken."""
    engine = Engine("alloc", prefix_caching=True)
    engine.manager.open("a", [1] * 12, salt=b"a")
    engine.write("a", 12, CANARY)
    engine.do(engine.manager.close, "a")
    assert has_canary(engine.bytes_of(np.arange(6)))
    engine.manager.open("b", [1] * 11, salt=b"b")
    for _ in range(11):
        before = engine.manager.block_table("b")
        appended = engine.manager.append("b", 1)
        engine.storage.on_alloc(np.setdiff1d(engine.manager.block_table("b"), before))
        assert len(appended.slots) == 1

    assert not engine.bytes_of(engine.manager.block_table("b")).any()


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize(("zero_on", "is_wiped"), [(None, True), ("never", False)])
def test_memory_that_tenants_share_is_wiped_by_the_plans_of_a_scheduler(
    zero_on: str | None, is_wiped: bool, prefix_caching: bool
) -> None:
    engine = Engine(zero_on, prefix_caching=prefix_caching, requires_salt=True)
    scheduler = Scheduler(SchedulerConfig(16, 2), engine.manager)
    for salt, byte in ((b"a", CANARY), (b"b", 0x00)):
        scheduler.add(Request(salt.decode(), [1] * 11, 1, salt=salt), 0.0)
        plan = scheduler.schedule(0.0)
        engine.storage.apply(plan)
        blocks = engine.manager.memory.sequences.blocks(int(plan.rows[0]))
        assert has_canary(engine.bytes_of(blocks)) == (salt == b"b" and not is_wiped)
        engine.storage.write_blocks(blocks, torch.full((6, SPEC.bytes_per_block), byte, dtype=torch.uint8))
        scheduler.update(plan, [1], 0.0)


def test_a_saved_file_holds_no_byte_behind_the_last_token(tmp_path) -> None:
    """The slots behind it may be an earlier owner's."""
    engine = Engine("never")
    leave_canaries(engine)
    engine.do(engine.manager.open, "next", [9] * 3)
    engine.write("next", 3, 0x11)
    assert has_canary(engine.bytes_of(engine.manager.block_table("next")))

    engine.storage.save_blocks(tmp_path / "a", engine.manager.block_table("next"), num_tokens=3)

    raw = np.frombuffer((tmp_path / "a").read_bytes()[-2 * SPEC.bytes_per_block :], np.uint8)
    assert set(raw.tolist()) == {0x00, 0x11}
