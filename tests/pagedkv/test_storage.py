"""The tensors hold what was written, through every move, bit for bit."""

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
    fail_at_line,
    filled,
    ids,
    pairs,
    small_spec,
)

from pagedkv import BlockCopies, BlockStateError, CacheConfig, ConfigError, InvalidArgumentError, KVCacheManager
from pagedkv.attention import paged_attention, write_kv
from pagedkv.plans import NO_COPIES
from pagedkv.storage import KVSpec, KVStorage, Moves
from pagedkv.storage import tensors as storage_tensors

HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device"))])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# Views


@pytest.mark.parametrize(("layout", "strides"), [("NHD", (2 * 128, 2 * 8, 8, 1)), ("HND", (2 * 128, 8, 4 * 8, 1))])
def test_a_layer_s_views_stand_whole_blocks_apart_in_the_order_that_was_asked_for(layout: str, strides: tuple) -> None:
    storage = KVStorage(KVSpec(2, 2, 8, dtype="float16", block_size=4), 3, layout=layout)

    for layer in range(2):
        for view in (storage.key_cache(layer), storage.value_cache(layer)):
            assert view.shape == (3, 4, 2, 8)
            assert view.dtype == torch.float16
            assert view.stride() == strides
        assert storage.k_scale(layer) is None
        assert storage.v_scale(layer) is None


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_views_share_a_byte_and_together_they_are_the_storage(dtype: str, layout: str, device: str) -> None:
    storage = KVStorage(KVSpec(3, 2, 16, dtype=dtype, block_size=4, value_dim=8), 2, device, layout=layout)

    marked = 0
    for layer in range(3):
        for view in (
            storage.key_cache(layer),
            storage.value_cache(layer),
            storage.k_scale(layer),
            storage.v_scale(layer),
        ):
            if view is not None:
                raw = view.view(torch.uint8)
                assert not raw.any()
                raw.fill_(1)
                marked += raw.numel()

    assert marked == 2 * storage.spec.bytes_per_block
    assert int(storage.read_blocks(ids(0, 1)).sum()) == marked


def test_int8_has_a_scale_per_token_and_head() -> None:
    storage = KVStorage(small_spec("int8"), 3)

    assert (storage.k_scale(0).shape, storage.k_scale(0).dtype) == ((3, 2, 2), torch.float32)
    assert storage.v_scale(1).shape == (3, 2, 2)


def test_int4_packs_two_channels_and_has_a_scale_per_group() -> None:
    storage = KVStorage(KVSpec(1, 2, 64, dtype="int4", block_size=2), 3)

    assert (storage.key_cache(0).shape, storage.key_cache(0).dtype) == ((3, 2, 2, 32), torch.uint8)
    assert (storage.k_scale(0).shape, storage.k_scale(0).dtype) == ((3, 2, 2, 2, 2), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_latent_s_values_are_the_first_channels_of_its_keys(dtype: str) -> None:
    storage = KVStorage(KVSpec.mla(2, latent_dim=64, rope_dim=32, dtype=dtype, block_size=2), 3)
    key, value = storage.key_cache(1), storage.value_cache(1)

    assert value.shape == (3, 2, 1, 64 // (2 if dtype == "int4" else 1))
    assert value.data_ptr() == key.data_ptr()
    if dtype == "int8":
        assert storage.v_scale(1).data_ptr() == storage.k_scale(1).data_ptr()
    if dtype == "int4":
        assert storage.k_scale(1).shape == (3, 2, 1, 3, 2)
        assert storage.v_scale(1).shape == (3, 2, 1, 2, 2)


@pytest.mark.parametrize("layer", [-1, 2, 1.0, None])
def test_a_layer_that_is_not_there_is_refused(layer: object) -> None:
    storage = KVStorage(small_spec(), 1)

    for view in (storage.key_cache, storage.value_cache, storage.k_scale, storage.v_scale):
        with pytest.raises(InvalidArgumentError, match="layer must be"):
            view(layer)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_writes_and_reads_through_the_views_as_through_tensors_of_its_own(dtype: str, layout: str) -> None:
    num_heads, head_dim, block_size, num_tokens = 2, 32, 4, 7
    storage = KVStorage(KVSpec(2, num_heads, head_dim, dtype=dtype, block_size=block_size), 4, layout=layout)
    layer = 1
    own = [storage.key_cache(layer), storage.value_cache(layer), storage.k_scale(layer), storage.v_scale(layer)]
    plain = [None if view is None else torch.zeros_like(view, memory_format=torch.contiguous_format) for view in own]
    number_type = (
        storage.key_cache(0).dtype if dtype in ("float64", "float32", "float16", "bfloat16") else torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    key, value, query = (
        torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(number_type) for _ in "kvq"
    )
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    slots = torch.tensor([3 * block_size + i for i in range(4)] + [block_size + i for i in range(3)])
    answers = []
    for keys, values, k_scale, v_scale in (own, plain):
        write_kv(key, value, keys, values, slots, k_scale=k_scale, v_scale=v_scale, backend="reference")
        lengths, starts = (
            torch.tensor([num_tokens], dtype=torch.int32),
            torch.tensor([0, num_tokens], dtype=torch.int32),
        )
        answers.append(
            paged_attention(
                query, keys, values, table, lengths, starts, k_scale=k_scale, v_scale=v_scale, backend="reference"
            )
        )

    assert torch.equal(*answers)
    assert answers[0].abs().sum() > 0
    assert not storage.key_cache(0).view(torch.uint8).any()


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_attention_takes_a_latent_cache_s_views(dtype: str) -> None:
    storage = KVStorage(KVSpec.mla(1, latent_dim=64, rope_dim=32, dtype=dtype, block_size=2), 3)
    generator = torch.Generator().manual_seed(0)
    latent, query = torch.randn(3, 1, 96, generator=generator), torch.randn(3, 4, 96, generator=generator)
    key, value, k_scale, v_scale = (
        view(0) for view in (storage.key_cache, storage.value_cache, storage.k_scale, storage.v_scale)
    )

    write_kv(latent, None, key, None, torch.tensor([4, 5, 0]), k_scale=k_scale, backend="reference")
    answer = paged_attention(
        query,
        key,
        value,
        torch.tensor([[2, 0]], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        k_scale=k_scale,
        v_scale=v_scale,
        backend="reference",
    )

    # The first query sees one key: its answer is that key's latent.
    assert (answer[0] - latent[0, :, :64]).abs().max() < {"float32": 1e-6, "int8": 0.05, "int4": 0.3}[dtype]


# Moves


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


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 100_000])
def test_pinned_memory_is_whole_pages_that_nobody_else_has(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    runtime = FakeRuntime(status=0)
    monkeypatch.setattr(storage_tensors, "_cudart", lambda: runtime)

    pages = storage_tensors._pinned_pages(num_bytes)

    assert runtime.registered == [(pages.data_ptr(), len(pages))]
    assert pages.data_ptr() % 4096 == len(pages) % 4096 == 0
    assert num_bytes <= len(pages) < num_bytes + 4096
    assert pages.untyped_storage().data_ptr() <= pages.data_ptr()
    assert pages.data_ptr() + len(pages) <= pages.untyped_storage().data_ptr() + pages.untyped_storage().nbytes()


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_tensors, "_cudart", lambda: FakeRuntime(status=2))

    with pytest.raises(RuntimeError, match="CUDA cannot page-lock 4096 bytes of host memory: error 2"):
        storage_tensors._pinned_pages(10)


class FakeRuntime:
    """Stands for torch.cuda.cudart()."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.registered: list[tuple[int, int]] = []

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's own name
        self.registered.append((pointer, num_bytes))
        return self.status


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
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


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
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


# What is refused, and that nothing has changed then

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


def test_zero_is_never_unless_asked_for() -> None:
    assert KVStorage(small_spec(), 1).zero_on == "never"


@pytest.mark.parametrize(
    ("requires_salt", "prefix_caching", "zero_on"),
    [(False, True, "never"), (False, False, "never"), (True, True, "alloc"), (True, False, "free")],
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
