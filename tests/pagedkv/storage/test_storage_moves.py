"""Blocks are swapped and copied bit for bit, in the order of the plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_contents import (
    DTYPES,
    assert_same,
    carried_out,
    contents,
    filled,
    ids,
    pairs,
    small_spec,
)

from pagedkv import BlockCopies, CacheConfig, KVCacheManager
from pagedkv.storage import KVStorage, Moves, host_memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_and_in_and_copied_again_every_bit_is_there(dtype: str, device: str) -> None:
    storage = KVStorage(small_spec(dtype, block_size=4), 4, device, 2)
    # Of each byte pattern: -0.0, quiet and signalling NaNs with payloads, infinities, subnormals.
    patterns = np.resize(
        np.uint8([0, 0x80, 0x01, 0x7F, 0xC0, 0xFF, 0x81, 0xF8, 0x7C, 0x55]), storage.spec.bytes_per_block
    )
    storage.write_blocks(ids(1), torch.from_numpy(patterns[None].copy()))

    storage.apply(Moves(swaps_out=pairs((1, 1))))
    storage.zero(ids(1))
    storage.apply(Moves(swaps_in=pairs((1, 3))))
    storage.apply(Moves(copies=pairs((3, 0))))

    for block_id in (0, 3):
        assert bytes(storage.read_blocks(ids(block_id)).numpy()[0]) == bytes(patterns)
    assert not storage.read_blocks(ids(1, 2)).any()


def test_a_negative_zero_and_a_nan_s_payload_survive_in_the_typed_view(device: str) -> None:
    storage = KVStorage(small_spec("bfloat16"), 2, device, 1)
    bits = torch.tensor([-0x8000, 0x7F81, -0x003F, 0x0001], dtype=torch.int16, device=device)
    storage.key_cache(1).view(torch.int16)[0, 1, 1] = bits

    storage.apply(Moves(swaps_out=pairs((0, 0)), swaps_in=pairs((0, 1))))

    assert torch.equal(storage.key_cache(1).view(torch.int16)[1, 1, 1], bits)
    assert storage.key_cache(1)[1, 1, 1].isnan().tolist() == [False, True, True, False]


def test_swaps_out_go_before_copies_and_these_before_swaps_in(device: str) -> None:
    storage = filled(small_spec(), 3, 2, device=device)
    before = contents(storage)

    # Block 0 leaves; a copy of 1 takes its place; what left comes back over 1.
    storage.apply(Moves(swaps_out=pairs((0, 1)), copies=pairs((1, 0)), swaps_in=pairs((1, 1))))

    after = contents(storage)
    np.testing.assert_array_equal(after["device"], before["device"][[1, 0, 2]])
    np.testing.assert_array_equal(after["host"][1], before["device"][0])


def test_a_block_that_was_copied_to_may_be_copied_from(device: str) -> None:
    storage = filled(small_spec(), 4, device=device)
    before = contents(storage)["device"]

    storage.apply(Moves(copies=pairs((0, 1), (1, 2), (2, 3))))

    np.testing.assert_array_equal(contents(storage)["device"], before[[0, 0, 0, 0]])


def test_a_block_that_was_copied_from_may_be_copied_to(device: str) -> None:
    storage = filled(small_spec(), 4, device=device)
    before = contents(storage)["device"]

    storage.apply(Moves(copies=pairs((2, 3), (1, 2), (0, 1))))

    np.testing.assert_array_equal(contents(storage)["device"], before[[0, 0, 1, 2]])


def test_a_block_that_is_copied_onto_itself_stays_and_the_others_are_copied(device: str) -> None:
    storage = filled(small_spec(), 3, device=device)
    before = contents(storage)["device"]

    storage.apply(Moves(copies=pairs((0, 1), (2, 2), (1, 0))))

    np.testing.assert_array_equal(contents(storage)["device"], before[[0, 0, 2]])


NUM_BLOCKS, NUM_HOST_BLOCKS = 7, 5


@st.composite
def moves(draw: st.DrawFn, num_sources: int, num_targets: int) -> BlockCopies:
    """Any sources to distinct targets; neighbours are as likely as jumps."""
    if draw(st.booleans()):
        count = draw(st.integers(0, min(num_sources, num_targets)))
        source, target = draw(st.integers(0, num_sources - count)), draw(st.integers(0, num_targets - count))
        return BlockCopies(np.arange(source, source + count), np.arange(target, target + count))
    targets = draw(st.lists(st.integers(0, num_targets - 1), unique=True))
    sources = draw(st.lists(st.integers(0, num_sources - 1), min_size=len(targets), max_size=len(targets)))
    return BlockCopies(ids(*sources), ids(*targets))


plans = st.builds(
    Moves, moves(NUM_BLOCKS, NUM_HOST_BLOCKS), moves(NUM_BLOCKS, NUM_BLOCKS), moves(NUM_HOST_BLOCKS, NUM_BLOCKS)
)


@given(st.lists(plans, min_size=1, max_size=4), st.sampled_from(DTYPES))
@settings(max_examples=150)
def test_any_plans_do_what_one_block_after_the_other_would_do(plan_list: list[Moves], dtype: str) -> None:
    storage = filled(small_spec(dtype), NUM_BLOCKS, NUM_HOST_BLOCKS)
    expected = contents(storage)

    for plan in plan_list:
        storage.apply(plan)
        expected = carried_out(expected, plan.swaps_out, plan.copies, plan.swaps_in)

    assert_same(contents(storage), expected)


@given(plans)
@settings(max_examples=50)
def test_the_whole_pieces_that_cuda_is_given_mean_the_same(plan: Moves) -> None:
    storage = filled(small_spec(), NUM_BLOCKS, NUM_HOST_BLOCKS)
    before = contents(storage)

    storage._stream = object()  # As on CUDA: the pieces are whole runs. Nothing here touches the stream itself.
    storage._move(plan)
    storage._stream = None

    assert_same(contents(storage), carried_out(before, plan.swaps_out, plan.copies, plan.swaps_in))


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5_000_000])
def test_memory_of_the_host_begins_where_a_huge_page_does(num_bytes: int) -> None:
    memory = host_memory.zero_bytes(num_bytes)

    assert len(memory) == num_bytes
    assert memory.data_ptr() % (2 << 20) == 0 or num_bytes == 0
    assert not memory.any()


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 100_000])
def test_pinned_memory_is_whole_pages_that_nobody_else_has(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    runtime = FakeRuntime(status=0)
    monkeypatch.setattr(host_memory, "_cudart", lambda: runtime)

    pages = host_memory.pinned_zero_bytes(num_bytes)

    assert runtime.registered == [(pages.data_ptr(), len(pages))]
    assert pages.data_ptr() % 4096 == len(pages) % 4096 == 0
    assert num_bytes <= len(pages) < num_bytes + 4096
    assert pages.untyped_storage().data_ptr() <= pages.data_ptr()
    assert pages.data_ptr() + len(pages) <= pages.untyped_storage().data_ptr() + pages.untyped_storage().nbytes()


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_cudart", lambda: FakeRuntime(status=2))

    with pytest.raises(RuntimeError, match="CUDA cannot page-lock 4096 bytes of host memory: error 2"):
        host_memory.pinned_zero_bytes(10)


class FakeRuntime:
    """Stands for torch.cuda.cudart()."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.registered: list[tuple[int, int]] = []

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's own name
        self.registered.append((pointer, num_bytes))
        return self.status


@needs_cuda
@given(st.lists(plans, min_size=1, max_size=4))
@settings(max_examples=30)
def test_any_plans_do_so_on_cuda_started_one_after_the_other(plan_list: list[Moves]) -> None:
    storage = filled(small_spec(), NUM_BLOCKS, NUM_HOST_BLOCKS, device="cuda")
    expected = contents(storage)

    for plan in plan_list:
        storage.start(plan)
        expected = carried_out(expected, plan.swaps_out, plan.copies, plan.swaps_in)
    storage.wait()

    assert_same(contents(storage), expected)


@needs_cuda
def test_host_memory_is_pinned_to_the_page() -> None:
    storage = KVStorage(small_spec(), 2, "cuda", 3)

    assert storage._buffers["host"].is_pinned()
    assert storage._buffers["host"].untyped_storage().nbytes() < 3 * storage.spec.bytes_per_block + 3 * 4096


def test_start_and_wait_are_the_two_halves_of_apply(device: str) -> None:
    storage = filled(small_spec(), 2, 1, device=device)
    before = contents(storage)

    storage.start(Moves(swaps_out=pairs((1, 0))))
    storage.wait()

    np.testing.assert_array_equal(contents(storage)["host"][0], before["device"][1])


def test_the_manager_s_plans_are_carried_out_as_they_are() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=2, num_host_blocks=2, prefix_caching=False))
    storage = filled(small_spec(), 4, 2)
    before = contents(storage)["device"]
    manager.open("a", [1, 2, 3])
    manager.append("a", 3)
    source = manager.block_table("a").tolist()
    manager.fork("a", "b")
    manager.extend("b", [4])

    appended = manager.append("b", 1)
    storage.apply(Moves(copies=appended.copies))
    storage.apply(Moves(swaps_out=manager.swap_out("b")))
    manager.close("a")
    storage.apply(Moves(swaps_in=manager.swap_in("b")))

    np.testing.assert_array_equal(storage.read_blocks(manager.block_table("b")), before[source])


def test_an_empty_plan_moves_nothing() -> None:
    storage = filled(small_spec(), 2)
    before = contents(storage)

    storage.apply(Moves())

    assert_same(contents(storage), before)


def test_storage_made_in_inference_mode_is_written_to_outside_of_it() -> None:
    with torch.inference_mode():
        storage = KVStorage(small_spec("float32"), 2)

    storage.key_cache(0).fill_(1.0)
    storage.apply(Moves(copies=pairs((0, 1))))

    assert storage.key_cache(0).sum() == 2 * 2 * 2 * 4
