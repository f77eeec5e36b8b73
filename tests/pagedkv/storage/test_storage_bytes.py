"""Blocks are zeroed when they should be, read and written as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from storage_contents import (
    assert_same,
    contents,
    filled,
    ids,
    pairs,
    small_spec,
)

from pagedkv import BlockStateError, CacheConfig, ConfigError, InvalidArgumentError
from pagedkv.plans import NO_COPIES
from pagedkv.storage import KVStorage, Moves

# Zeroing


def test_blocks_are_zeroed_whole_and_no_others(device: str) -> None:
    storage = filled(small_spec("int8"), 5, 2, device=device)
    before = contents(storage)

    storage.zero(ids(1, 2, 4))
    storage.zero(ids(0), where="host")

    after = contents(storage)
    assert not after["device"][[1, 2, 4]].any()
    assert not after["host"][0].any()
    np.testing.assert_array_equal(after["device"][[0, 3]], before["device"][[0, 3]])
    np.testing.assert_array_equal(after["host"][1], before["host"][1])


@pytest.mark.parametrize(
    ("zero_on", "is_zero_after_free", "is_zero_after_alloc"),
    [("free", True, False), ("alloc", False, True), ("never", False, False)],
)
def test_zero_on_says_at_which_news_blocks_are_zeroed(
    zero_on: str, is_zero_after_free: bool, is_zero_after_alloc: bool
) -> None:
    storage = filled(small_spec(), 2, 2, zero_on=zero_on)

    storage.on_free(ids(0))
    storage.on_free(ids(1), where="host")
    storage.on_alloc(ids(1))

    after = contents(storage)
    assert (not after["device"][0].any()) == is_zero_after_free
    assert (not after["host"][1].any()) == is_zero_after_free
    assert (not after["device"][1].any()) == is_zero_after_alloc
    assert after["host"][0].any()


@pytest.mark.parametrize(
    ("moves", "device_blocks"),
    [
        (Moves(taken=ids(1)), [0, None, 2]),
        (Moves(swaps_out=pairs((1, 0)), taken=ids(1)), [0, None, 2]),
        (Moves(copies=pairs((0, 1)), taken=ids(0, 1)), [None, 0, 2]),
        (Moves(swaps_in=pairs((1, 2)), taken=ids(2, 0)), [None, 1, "host 1"]),
    ],
    ids=["taken", "swapped out before", "copied to and from", "swapped in"],
)
def test_blocks_that_a_plan_took_are_zeroed_once_they_were_read_unless_they_were_filled(
    moves: Moves, device_blocks: list[int | str | None]
) -> None:
    storage = filled(small_spec(), 3, 2, zero_on="alloc")
    before = contents(storage)
    expected = {block: before["device"][block] for block in range(3)} | {None: 0, "host 1": before["host"][1]}

    storage.apply(moves)

    after = contents(storage)
    for block, what in enumerate(device_blocks):
        assert (after["device"][block] == expected[what]).all()
    if len(moves.swaps_out):
        np.testing.assert_array_equal(after["host"][0], before["device"][1])


@pytest.mark.parametrize("zero_on", ["free", "never"])
def test_blocks_that_a_plan_took_keep_their_bytes_unless_they_are_to_be_wiped(zero_on: str) -> None:
    storage = filled(small_spec(), 2, 0, zero_on=zero_on)
    before = contents(storage)
    storage.apply(Moves(taken=ids(1)))
    assert_same(contents(storage), before)


def test_zero_is_never_unless_asked_for() -> None:
    assert KVStorage(small_spec(), 1).zero_on == "never"


@pytest.mark.parametrize(
    ("requires_salt", "prefix_caching", "zero_on"),
    [(False, True, "never"), (False, False, "never"), (True, True, "alloc"), (True, False, "alloc")],
)
def test_memory_that_tenants_share_is_wiped_unless_that_is_denied(
    requires_salt: bool, prefix_caching: bool, zero_on: str
) -> None:
    spec = small_spec()
    config = CacheConfig(3, spec.block_size, 2, prefix_caching, requires_salt=requires_salt)

    storage = KVStorage.for_cache(spec, config, layout="HND")

    assert (storage.num_blocks, storage.num_host_blocks, storage.layout) == (3, 2, "HND")
    assert storage.zero_on == zero_on
    assert KVStorage.for_cache(spec, config, zero_on="never").zero_on == "never"


def test_storage_for_a_cache_of_other_blocks_is_refused() -> None:
    spec = small_spec()

    with pytest.raises(ConfigError, match=f"spec has blocks of {spec.block_size} tokens, config of 64"):
        KVStorage.for_cache(spec, CacheConfig(3, 64))


@pytest.mark.parametrize(("wrong", "where"), [(ids(2), "device"), (ids(-1), "device"), (ids(0, 1), "host")])
def test_blocks_that_are_not_there_are_neither_zeroed_nor_read_nor_written(wrong: np.ndarray, where: str) -> None:
    storage = filled(small_spec(), 2, 1)
    before = contents(storage)

    for call in (
        storage.zero,
        storage.read_blocks,
        lambda block_ids, where: storage.write_blocks(block_ids, None, where=where),
    ):
        with pytest.raises(BlockStateError, match=f"block_ids: there is no block .* among {len(before[where])}"):
            call(wrong, where=where)

    assert_same(contents(storage), before)


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="where must be 'device' or 'host', found 'disk'"):
        KVStorage(small_spec(), 1).zero(ids(0), where="disk")


# Bytes


def test_blocks_are_read_and_written_in_the_order_that_was_asked_for(device: str) -> None:
    storage = filled(small_spec(), 4, 2, device=device)
    before = contents(storage)

    content = storage.read_blocks(ids(3, 0, 1, 3))
    np.testing.assert_array_equal(content, before["device"][[3, 0, 1, 3]])
    storage.write_blocks(ids(1, 2, 3), content[:3])
    storage.write_blocks(ids(1), content[:1], where="host")

    np.testing.assert_array_equal(contents(storage)["device"], before["device"][[0, 3, 0, 1]])
    np.testing.assert_array_equal(contents(storage)["host"][1], before["device"][3])


def test_content_that_does_not_fit_is_refused() -> None:
    storage = filled(small_spec(), 3)
    before = contents(storage)
    content = storage.read_blocks(ids(0, 1))

    for wrong in (content[:1], content[:, :-1], content.to(torch.int16), content.view(torch.int8)):
        with pytest.raises(InvalidArgumentError, match="content must be uint8"):
            storage.write_blocks(ids(1, 2), wrong)
    with pytest.raises(BlockStateError, match="block_ids: block 2 stands there twice"):
        storage.write_blocks(ids(2, 2), content)

    assert_same(contents(storage), before)


def test_no_blocks_are_no_work() -> None:
    storage = filled(small_spec(), 1)

    assert storage.read_blocks(NO_COPIES.sources).shape == (0, storage.spec.bytes_per_block)
    storage.write_blocks(ids(), storage.read_blocks([]))
    storage.zero([])
