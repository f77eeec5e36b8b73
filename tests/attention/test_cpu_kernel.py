"""The C kernel: every instruction set, the threads it runs on, how it is built, found and done without."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from agreement import check
from batches import Batch, one_thread

from pagedkv.attention import backend_info, paged_attention, plan, write_kv
from pagedkv.attention.backends import backend_named, pick_for_device
from pagedkv.attention.cpu import build
from pagedkv.attention.cpu.backend import CPUBackend
from pagedkv.attention.cpu.build import KernelBuildError, compile_kernel, find_kernel, kernel_name
from pagedkv.attention.cpu.library import AttentionCallC, Kernel
from pagedkv.attention.formats import dequantize

HAS_COMPILER = build.can_compile()
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
SETS = ("amx", "avx512vnni", "avx512bf16", "avx512", "avx2int16", "avx2", "plain", "neon")


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    if not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    backend = backend_named("cpu")
    assert isinstance(backend, CPUBackend)
    first = backend.kernel.instruction_set
    yield backend.kernel
    backend.kernel.instruction_set = first


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # what is built is not run here
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "pagedkv")
    return tmp_path / "pagedkv"


MIXED = Batch(
    lens=((1, 700), (5, 40), (130, 131), (0, 9), (1, 1)), num_kv_heads=2, group=4, head_dim=128, value_dim=128
)
CASES = {
    "mixed": MIXED,
    "odd sizes": Batch(
        lens=((70, 300), (3, 130), (1, 5)), block_size=5, num_kv_heads=2, group=3, head_dim=80, value_dim=48,
        window=(37, None), softcap=3.0,
    ),
    "no causality": Batch(
        lens=((1, 300), (3, 130), (5, 5), (9, 4)), block_size=1, num_kv_heads=4, head_dim=112, value_dim=96,
        causal=False, window=(30, 2), has_sinks=True, has_alibi=True,
    ),
    "many rows of one head": Batch(lens=((1, 600), (3, 130)), group=32, head_dim=192, value_dim=128, has_sinks=True),
    "tiles of keys that are full, begun, and seen by some rows": Batch(
        lens=((70, 1100), (33, 545), (17, 257), (1, 700)), num_kv_heads=2, group=2, head_dim=64, value_dim=96,
        window=(600, None), has_sinks=True,
    ),
    "many rows of several heads": Batch(lens=((1, 300), (2, 90)), num_kv_heads=3, group=24, head_dim=64, value_dim=64),
    "heads outside": Batch(
        lens=((1, 300), (4, 90), (40, 77)), block_size=20, num_kv_heads=3, group=2, head_dim=96, value_dim=160, layout="hnd",
    ),
    "latent": Batch(lens=((1, 300), (2, 33)), group=16, head_dim=576, value_dim=512, layout="latent"),
    "tree": Batch(lens=((5, 50), (33, 80)), num_kv_heads=2, group=2, has_tree_mask=True),
}  # fmt: skip


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_instruction_set_agrees_with_float64(kernel: Kernel, instruction_set: str, dtype: str) -> None:
    if instruction_set not in kernel.instruction_sets:
        pytest.skip(f"this processor has no {instruction_set}")
    kernel.instruction_set = instruction_set

    with one_thread():
        for batch in CASES.values():
            for cache in ("float", "int8", "fp8_e4m3", "fp8_e5m2", "int4"):
                if batch.layout == "latent" and cache == "int4":
                    continue
                case = dataclasses.replace(batch, dtype=dtype, cache=cache, int4_groups=(1, 1))
                check(case, *case.call("cpu"))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_all_that_one_key_has_to_say_is_its_value(kernel: Kernel, instruction_set: str, dtype: torch.dtype) -> None:
    if instruction_set not in kernel.instruction_sets:
        pytest.skip(f"this processor has no {instruction_set}")
    kernel.instruction_set = instruction_set
    # Every code of fp8; of int4 all sixteen in each of eight groups.
    num_codes = 128 if dtype == torch.uint8 else 256
    codes = torch.arange(num_codes, dtype=torch.uint8) * (17 if dtype == torch.uint8 else 1)
    cache = codes.view(dtype).view(1, 1, 1, num_codes)
    scale = None
    if dtype == torch.uint8:
        generator = torch.Generator().manual_seed(0)
        scale = torch.randn(1, 1, 1, 8, 2, generator=generator).bfloat16()
    numbers = dequantize(cache, scale, torch.float32)
    query = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.int32)

    keys = torch.zeros_like(cache.view(torch.uint8)).view(dtype)
    out = paged_attention(
        query, keys, cache, torch.zeros(1, 1, dtype=torch.int32), one, torch.tensor([0, 1], dtype=torch.int32),
        k_scale=scale, v_scale=scale, backend="cpu",
    )  # fmt: skip

    assert torch.equal(out[0, 0].nan_to_num(1e30), numbers[0, 0, 0].bfloat16().nan_to_num(1e30))


def test_the_best_instruction_sets_come_first_and_the_last_in_use_serves_everything(kernel: Kernel) -> None:
    names = list(kernel.instruction_sets)

    assert names == [name for name in SETS if name in names]
    assert kernel.in_use == names[: len(kernel.in_use)]
    assert kernel.in_use[-1] in {"avx512", "avx2", "plain", "neon"}


def test_results_do_not_depend_on_the_number_of_threads_but_for_rounding(kernel: Kernel) -> None:
    batch = dataclasses.replace(MIXED, dtype="bfloat16", lens=((1, 5000), (1, 300), (200, 700)))
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            check(batch, *batch.call("cpu"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_second_pool_of_threads_is_made(kernel: Kernel) -> None:
    before = torch.get_num_threads()
    batch = dataclasses.replace(MIXED, lens=((1, 3000),) * 4)
    try:
        torch.set_num_threads(2)
        torch.ones(1 << 20).sum()
        batch.call("cpu")
        num_threads = len(list(Path("/proc/self/task").iterdir()))
        for _ in range(3):
            torch.ones(1 << 20).sum()
            batch.call("cpu")
        assert kernel.shares_threads
        assert len(list(Path("/proc/self/task").iterdir())) == num_threads
    finally:
        torch.set_num_threads(before)


def test_threads_of_its_own_do_the_same_work(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_parallel", None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(MIXED, *MIXED.call("cpu"))
    finally:
        torch.set_num_threads(before)


def test_threads_that_call_at_once_get_their_own_results(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    first_call = kernel.attend

    def call_after_a_pause(c: AttentionCallC, num_threads: int) -> None:
        # The other thread fills its structure now, as it may wherever the interpreter hands over.
        time.sleep(1e-4)
        first_call(c, num_threads)

    monkeypatch.setattr(kernel, "attend", call_after_a_pause)

    def worker(value: float) -> set[float]:
        key, slots = torch.full((1, 2, 8), value), torch.tensor([5])
        key_cache, value_cache = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
        tables, one = torch.tensor([[1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
        starts, seen = torch.tensor([0, 1], dtype=torch.int32), set()
        for _ in range(50):
            write_kv(key, key, key_cache, value_cache, slots - 1, backend="cpu")
            write_kv(key, key, key_cache, value_cache, slots, backend="cpu")
            out = paged_attention(key, key_cache, value_cache, tables, one, starts, backend="cpu")
            seen |= set(out.flatten().tolist())
            key_cache, value_cache = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
        return seen

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(worker, (1.0, 2.0, 3.0, 4.0)))

    assert results == [{1.0}, {2.0}, {3.0}, {4.0}]


def test_a_call_reads_the_caches_it_is_given_where_only_their_address_is_new(kernel: Kernel) -> None:
    tables, one = torch.tensor([[0]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    step = plan(one, starts, num_q_heads=2, num_kv_heads=2, backend="cpu")
    caches = [torch.full((1, 4, 2, 8), value) for value in (1.0, 2.0)]

    outs = [
        paged_attention(torch.ones(1, 2, 8), cache, cache, tables, one, starts, plan=step)
        for cache in (*caches, caches[0])
    ]

    assert [set(out.flatten().tolist()) for out in outs] == [{1.0}, {2.0}, {1.0}]


def test_nan_among_the_keys_that_are_seen_comes_out_as_nan(kernel: Kernel) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.ones(2, 1, 64, dtype=dtype)
        cache = torch.ones(2, 16, 1, 64, dtype=dtype)
        cache[1, 3] = torch.nan
        tables = torch.tensor([[0], [1]], dtype=torch.int32)
        lens = torch.tensor([16, 16], dtype=torch.int32)

        out = paged_attention(
            query, cache, cache, tables, lens, torch.tensor([0, 1, 2], dtype=torch.int32), backend="cpu"
        )

        assert isinstance(out, torch.Tensor)
        assert out[0].eq(1).all()
        assert out[1].isnan().all()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("cache", ["float", "int8", "fp8_e4m3", "int4"])
def test_nan_in_drafts_that_nobody_sees_stays_there(kernel: Kernel, instruction_set: str, cache: str) -> None:
    if instruction_set not in kernel.instruction_sets:
        pytest.skip(f"this processor has no {instruction_set}")
    kernel.instruction_set = instruction_set
    # A decode and a prefill, each with a tile of keys before the drafts.
    for dtype in ("float32", "bfloat16"):
        batch = Batch(
            ((5, 50), (33, 170)), dtype=dtype, cache=cache, num_kv_heads=2, group=2,
            has_tree_mask=True, has_unwritten_drafts=True,
        )  # fmt: skip
        with one_thread():
            check(batch, *batch.call("cpu"))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scales_of_int8_values_may_have_either_sign(kernel: Kernel, sign: float) -> None:
    batch = Batch(((1, 40), (20, 30)), dtype="bfloat16", cache="int8")
    tensors = dict(batch.tensors())
    expected, _ = batch.truth()

    out = paged_attention(**tensors | {"v_scale": sign * tensors["v_scale"]}, backend="cpu")

    torch.testing.assert_close(out.double(), sign * expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("channel", [0, 5, 63])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.uint8])
def test_nan_that_is_written_to_a_quantised_cache_is_read_as_nan(
    kernel: Kernel, cache_dtype: torch.dtype, channel: int
) -> None:
    is_int8 = cache_dtype == torch.int8
    cache = torch.ones(1, 4, 1, 64 if is_int8 else 32, dtype=cache_dtype)
    scale = torch.ones(1, 4, 1) if is_int8 else torch.ones(1, 4, 1, 1, 2, dtype=torch.bfloat16)
    new = torch.linspace(-2, 2, 128).view(2, 1, 64).clone()
    new[1, 0, channel] = torch.nan
    write_kv(new, None, cache, None, torch.tensor([0, 1]), k_scale=scale, backend="cpu")
    tables, starts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    good_cache, good_scale = cache.clone(), scale.clone()
    good_cache[0, 1], good_scale[0, 1] = cache[0, 0], scale[0, 0]

    for dtype in (torch.float32, torch.bfloat16):
        for length, has_nan in ((1, False), (2, True)):
            lens = torch.tensor([length], dtype=torch.int32)
            out = paged_attention(
                torch.ones(1, 1, 64, dtype=dtype), good_cache, cache, tables, lens, starts,
                k_scale=good_scale, v_scale=scale, backend="cpu",
            )  # fmt: skip
            assert bool(out.isnan().all()) is has_nan

    assert scale[0, 1].isnan().all()
    assert not scale[0, 0].isnan().any()


@pytest.mark.parametrize("channel", [0, 5, 63])
def test_nan_in_a_query_of_an_int8_cache_comes_out_as_nan(kernel: Kernel, channel: int) -> None:
    batch = Batch(((1, 9), (1, 9)), dtype="bfloat16", cache="int8")
    query = batch.tensors()["query"].clone()
    query[1, 0, channel] = torch.nan

    out = paged_attention(**batch.tensors() | {"query": query}, backend="cpu")

    assert not out[0].isnan().any()
    assert out[1].isnan().all()


def test_scales_of_slots_that_lie_far_apart_are_read(kernel: Kernel) -> None:
    batch = Batch(((1, 40), (20, 30)), cache="int8", num_kv_heads=2)
    tensors = dict(batch.tensors())
    for name in ("k_scale", "v_scale"):
        room = torch.full((16, 4096, 2), torch.nan)
        scale = room[:, : tensors[name].shape[0]].transpose(0, 1)
        tensors[name] = scale.copy_(tensors[name])

    out, lse = paged_attention(**tensors, return_lse=True, backend="cpu")

    check(batch, out, lse)


@needs_compiler
def test_the_kernel_is_compiled_once_and_found_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_kernel()
    assert first == empty_cache / kernel_name()
    assert list(empty_cache.iterdir()) == [first]
    monkeypatch.setattr(build, "COMPILERS", ())

    assert find_kernel() == first


@needs_compiler
def test_a_kernel_beside_its_sources_is_preferred(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kernels"
    shutil.copytree(build.SOURCES, package, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build, "SOURCES", package)
    compile_kernel(package / kernel_name())

    assert find_kernel() == package / kernel_name()
    assert not empty_cache.exists()


def test_other_sources_make_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = kernel_name()
    package = tmp_path / "kernels"
    shutil.copytree(build.SOURCES, package)
    monkeypatch.setattr(build, "SOURCES", package)
    assert kernel_name() == name
    (package / "call.h").write_text((package / "call.h").read_text() + "\n")

    assert kernel_name() != name


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_loaded_from(empty_cache: Path) -> None:
    cached = find_kernel()
    cached.parent.chmod(0o702)

    with pytest.raises(KernelBuildError, match="can be written by other users"):
        find_kernel()


@needs_compiler
def test_a_compiler_that_fails_says_why(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kernels"
    shutil.copytree(build.SOURCES, package, ignore=shutil.ignore_patterns("*.so"))
    (package / "attention.c").write_text("int main(void) { return missing; }\n")
    monkeypatch.setattr(build, "SOURCES", package)

    with pytest.raises(KernelBuildError, match=r"failed: .*missing"):
        find_kernel()
    assert list(empty_cache.iterdir()) == []


def test_without_a_compiler_torch_serves_and_one_warning_says_so(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kernels"
    shutil.copytree(build.SOURCES, package, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build, "SOURCES", package)
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr("pagedkv.attention.backends._REGISTRY", {})

    with pytest.warns(RuntimeWarning, match="no C compiler found"):
        picked = pick_for_device(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = {backend.name: backend for backend in backend_info()}
        with one_thread():
            check(MIXED, *MIXED.call(None))

    assert picked.name == "torch"
    assert not info["cpu"].is_available
    assert "no C compiler" in info["cpu"].detail


@needs_compiler
def test_a_library_whose_structures_differ_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = [*AttentionCallC._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr("pagedkv.attention.cpu.library.AttentionCallC", Longer)

    with pytest.raises(OSError, match="bytes, ours has"):
        Kernel(find_kernel())


def test_products_of_others_on_the_same_thread_are_left_right(kernel: Kernel) -> None:
    """Tile registers are configured per thread: ours must not be found by torch's products, nor theirs by us."""
    batch = dataclasses.replace(MIXED, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 96, generator=generator).bfloat16()
    heads = torch.randn(1, 2, 600, 128, generator=generator).bfloat16()

    def others() -> tuple[torch.Tensor, torch.Tensor]:
        return matrix @ matrix, torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    with one_thread():
        before = others()
        for _ in range(2):
            check(batch, *batch.call("cpu"))
            for old, new in zip(before, others(), strict=True):
                assert torch.equal(old, new)


def test_tile_registers_serve_many_rows_of_bf16_only(kernel: Kernel) -> None:
    """A decode of int8 is faster with products of integers: it must not follow the prefill chunks."""
    if "amx" not in kernel.instruction_sets or "avx512vnni" not in kernel.instruction_sets:
        pytest.skip("this processor has no tile registers")
    results = {}
    for lens in (((1, 300),), ((40, 300),)):
        batch = dataclasses.replace(MIXED, dtype="bfloat16", cache="int8", lens=lens)
        for name in ("amx", "avx512vnni"):
            kernel.instruction_set = name
            with one_thread():
                results[lens, name] = batch.call("cpu")[0]

    assert torch.equal(results[((1, 300),), "amx"], results[((1, 300),), "avx512vnni"])
    assert not torch.equal(results[((40, 300),), "amx"], results[((40, 300),), "avx512vnni"])
