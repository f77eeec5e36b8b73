"""What a storage refuses, and that nothing has changed then, whichever line failed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from storage_contents import (
    assert_same,
    carried_out,
    contents,
    fail_at_line,
    filled,
    ids,
    pairs,
    small_spec,
)

from pagedkv import BlockCopies, BlockStateError, ConfigError, InvalidArgumentError
from pagedkv.storage import KVSpec, KVStorage, Moves

BAD_MOVES = [
    ("swaps_out", pairs((2, 0)), BlockStateError, "swaps_out.sources: there is no block 2 among 2"),
    ("swaps_out", pairs((0, 3)), BlockStateError, "swaps_out.targets: there is no block 3 among 3"),
    ("swaps_out", pairs((0, -1)), BlockStateError, "swaps_out.targets: there is no block -1 among 3"),
    ("swaps_out", pairs((0, 1), (1, 1)), BlockStateError, "swaps_out.targets: block 1 stands there twice"),
    ("copies", pairs((0, 1), (0, 2)), BlockStateError, "copies.targets: there is no block 2 among 2"),
    ("copies", pairs((-1, 1)), BlockStateError, "copies.sources: there is no block -1 among 2"),
    ("copies", pairs((0, 1), (1, 1)), BlockStateError, "copies.targets: block 1 stands there twice"),
    ("swaps_in", pairs((3, 0)), BlockStateError, "swaps_in.sources: there is no block 3 among 3"),
    ("swaps_in", pairs((0, 2)), BlockStateError, "swaps_in.targets: there is no block 2 among 2"),
    ("swaps_in", pairs((0, 0), (1, 0)), BlockStateError, "swaps_in.targets: block 0 stands there twice"),
    (
        "copies",
        np.array([[0, 1]]),
        InvalidArgumentError,
        r"copies must be BlockCopies\(sources, targets\), found ndarray",
    ),
    ("copies", BlockCopies(ids(0), ids(0, 1)), InvalidArgumentError, "copies has 1 sources and 2 targets"),
    (
        "copies",
        BlockCopies(np.array([0.0]), ids(1)),
        InvalidArgumentError,
        "copies.sources must be one row of block ids",
    ),
    ("swaps_in", BlockCopies(ids(0), np.array([True])), InvalidArgumentError, "swaps_in.targets must be one row"),
    ("copies", BlockCopies([[0], [1, 0]], ids(1)), InvalidArgumentError, "copies.sources must be one row of block ids"),
    ("swaps_in", BlockCopies(ids(0)[None], ids(0)), InvalidArgumentError, "swaps_in.sources must be one row"),
]


@pytest.mark.parametrize(("name", "wrong", "error", "message"), BAD_MOVES)
def test_a_wrong_move_is_refused_before_any_right_one_is_made(
    name: str, wrong: BlockCopies, error: type[Exception], message: str
) -> None:
    storage = filled(small_spec(), 2, 3)
    before = contents(storage)
    right = {"swaps_out": pairs((0, 2)), "copies": pairs((0, 1)), "swaps_in": pairs((1, 0))}

    with pytest.raises(error, match=message):
        storage.apply(Moves(**{**right, name: wrong}))

    assert_same(contents(storage), before)


def test_swaps_without_host_blocks_are_refused() -> None:
    storage = KVStorage(small_spec(), 2)

    with pytest.raises(BlockStateError, match=r"swaps_out.targets: there is no block 0 among 0"):
        storage.apply(Moves(swaps_out=pairs((0, 0))))
    with pytest.raises(BlockStateError, match=r"swaps_in.sources: there is no block 0 among 0"):
        storage.apply(Moves(swaps_in=pairs((0, 0))))


PLAN = Moves(pairs((0, 2), (1, 0), (3, 1)), pairs((4, 0), (0, 1), (1, 5)), pairs((3, 3), (2, 4)))


def test_a_fault_at_any_line_leaves_both_sides_as_they_were_to_the_bit() -> None:
    storage = filled(small_spec(), 6, 4)
    before = contents(storage)
    num_lines = 0

    while fail_at_line(num_lines + 1, lambda: storage.apply(PLAN)):
        num_lines += 1
        assert_same(contents(storage), before)

    assert num_lines > 60
    assert_same(contents(storage), carried_out(before, PLAN.swaps_out, PLAN.copies, PLAN.swaps_in))


def test_all_bytes_of_a_plan_are_moved_by_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = filled(small_spec(), 6, 4)
    calls = []

    def record(targets: list, sources: list, **options: bool) -> None:
        calls.append([target.numel() * 8 // 128 for target in targets])

    monkeypatch.setattr(torch, "_foreach_copy_", record)
    storage.apply(PLAN)

    assert calls == [[1, 1, 1, 1, 1, 1, 1, 1]]


def test_a_failing_native_call_is_told_and_nothing_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = filled(small_spec(), 6, 4)
    before = contents(storage)

    def fail(*arguments: object, **options: bool) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            storage.apply(PLAN)

    assert_same(contents(storage), before)


def test_neighbours_are_swapped_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = filled(small_spec(), 6, 6)
    pieces = []

    def record(targets: list, sources: list, **options: bool) -> None:
        pieces.extend(target.numel() * 8 // 128 for target in targets)

    monkeypatch.setattr(torch, "_foreach_copy_", record)
    storage.apply(Moves(swaps_out=pairs((0, 1), (1, 2), (2, 3), (5, 4), (4, 5))))

    assert pieces == [3, 1, 1]


def test_on_a_cpu_no_piece_is_so_large_that_threads_would_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = filled(KVSpec(1, 1, 2**13, dtype="float64", block_size=5), 3, 3)
    assert storage.spec.bytes_per_block == 5 * 2**17
    expected = contents(storage)["device"][[2, 1]]
    pieces = []
    copy = torch._foreach_copy_

    def record(targets: list, sources: list, **options: bool) -> None:
        pieces.extend(target.numel() for target in targets)
        copy(targets, sources, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", record)
    storage.apply(Moves(swaps_out=pairs((2, 0), (1, 2))))

    assert pieces == [27307, 27307, 27306] * 2
    np.testing.assert_array_equal(storage.read_blocks(ids(0, 2), where="host"), expected)


def test_content_may_start_at_any_byte() -> None:
    storage = filled(small_spec(), 2)
    content = torch.arange(3 * 128 + 1, dtype=torch.uint8)[1:].view(3, 128)

    storage.write_blocks(ids(1), content[1:2])

    assert torch.equal(storage.read_blocks(ids(1)), content[1:2])


@pytest.mark.parametrize("call", ["zero", "write_blocks"])
def test_a_fault_at_any_line_of_a_write_leaves_the_blocks_as_they_were(call: str) -> None:
    storage = filled(small_spec(), 4)
    before = contents(storage)
    arguments = (ids(0, 1, 3),) if call == "zero" else (ids(0, 1, 3), storage.read_blocks(ids(1, 3, 0)))
    num_lines = 0

    while fail_at_line(num_lines + 1, lambda: getattr(storage, call)(*arguments)):
        num_lines += 1
        assert_same(contents(storage), before)

    assert num_lines > 10
    assert (contents(storage)["device"] != before["device"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be in 1"),
        ({"num_blocks": True}, "num_blocks must be a whole number"),
        ({"host_blocks": -1}, "host_blocks must be in 0"),
        ({"layout": "nhd"}, "layout must be 'NHD' or 'HND', found 'nhd'"),
        ({"zero_on": "always"}, "zero_on must be 'free', 'alloc' or 'never', found 'always'"),
        ({"device": "meta"}, "device must be a CPU or a CUDA device, found meta"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVStorage(**{"spec": small_spec(), "num_blocks": 2, **options})


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="device is cuda, but this torch sees no CUDA GPU: use device='cpu'"):
        KVStorage(small_spec(), 2, "cuda")
