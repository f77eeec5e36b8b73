"""Every backend on random batches, held against float64: as exact as plain torch in the same dtype, or it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from agreement import PARTITIONS, check, check_call, check_random_batches, check_refusal, divided
from batches import Batch
from caches import DTYPES, FORMATS
from kernel_model import KernelModel
from random_batches import random_batch
from torch import Tensor
from writes import Write, random_write

from pagedkv.attention import BackendUnsupportedError, backend_info
from pagedkv.attention.backends import _REGISTRY, backend_named

AVAILABLE = [info.name for info in backend_info() if info.is_available]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
READERS = [(name, device) for name in AVAILABLE for device in DEVICES if backend_named(name).runs_on(device)]
# An interpreted kernel takes a second for a batch.
FEW = {("triton", "cpu"): 6, ("model", "cpu"): 30}
MANY = {("triton", "cpu"): 100, ("model", "cpu"): 300}


def few(backend: str, device: str) -> range:
    return range(FEW.get((backend, device), 200))


def many(backend: str, device: str) -> range:
    return range(1000, 1000 + MANY.get((backend, device), 10_000))


@pytest.fixture(autouse=True)
def the_model_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    # Last in the registry: it is asked for by name and never picked.
    monkeypatch.setitem(_REGISTRY, "model", KernelModel())


ALL_READERS = [*READERS, ("model", "cpu")]
# The reference does not look at tasks.
TASK_READERS = [reader for reader in ALL_READERS if reader[0] != "reference"]


# ---- Reading


def random_batches_agree(backend: str, device: str, seeds: range) -> None:
    def check_one(batch: Batch) -> None:
        check_call(batch, backend, device, is_planned=batch.seed % 2 == 1)

    check_random_batches(check_one, seeds)


def random_splits_agree(backend: str, device: str, seeds: range) -> None:
    def check_one(batch: Batch) -> None:
        with divided(backend, *PARTITIONS[batch.seed % len(PARTITIONS)]):
            check_call(batch, backend, device, is_planned=True)

    check_random_batches(check_one, seeds)


@pytest.mark.parametrize(("backend", "device"), ALL_READERS)
def test_random_batches_agree_with_float64(backend: str, device: str) -> None:
    random_batches_agree(backend, device, few(backend, device))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "device"), ALL_READERS)
def test_many_random_batches_agree_with_float64(backend: str, device: str) -> None:
    random_batches_agree(backend, device, many(backend, device))


@pytest.mark.parametrize(("backend", "device"), TASK_READERS)
def test_a_batch_cut_into_many_splits_agrees_with_float64(backend: str, device: str) -> None:
    random_splits_agree(backend, device, few(backend, device))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "device"), TASK_READERS)
def test_many_batches_cut_into_many_splits_agree_with_float64(backend: str, device: str) -> None:
    random_splits_agree(backend, device, many(backend, device))


# Triton's interpreter warns of numbers that it computes and throws away; test_triton_attention.py has a batch of its own.
@pytest.mark.parametrize(("backend", "device"), [reader for reader in ALL_READERS if reader[0] != "triton"])
def test_drafts_that_nobody_sees_may_hold_anything(backend: str, device: str) -> None:
    for seed in range(12):
        batch = random_batch(seed)
        trees = {
            "window": None,
            "causal": True,
            "has_alibi": False,
            "has_tree_mask": True,
            "has_unwritten_drafts": True,
        }
        batch = dataclasses.replace(batch, lens=(*batch.lens, (5, 50), (33, 170)), **trees)
        check_call(batch, backend, device, is_planned=seed % 2 == 1)


@pytest.mark.parametrize(("backend", "device"), READERS)
def test_long_sequences_agree_with_float64(backend: str, device: str) -> None:
    # Long enough for the backend's own partition to split them; an interpreter gets one of the dtypes.
    for dtype in DTYPES[:1] if (backend, device) in FEW else DTYPES:
        check_call(Batch(((1, 2100), (70, 600), (3, 1)), dtype=dtype, num_kv_heads=2, group=4), backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), READERS)
def test_a_backend_serves_what_every_engine_needs(backend: str, device: str, dtype: str) -> None:
    needs: tuple[dict[str, object], ...] = (
        {},
        {"num_kv_heads": 2, "group": 4},
        {"group": 8},
        {"layout": "hnd"},
        {"layout": "joint"},
        {"window": (20, 0)},
        {"softcap": 30.0},
        {"has_sinks": True},
        {"has_alibi": True},
        {"causal": False},
        {"head_dim": 128, "value_dim": 128, "block_size": 32},
        {"head_dim": 80, "value_dim": 80},
    )
    for need in needs:
        batch = Batch(((1, 33), (9, 20)), dtype=dtype, **need)  # type: ignore[arg-type]
        check(batch, *batch.call(backend, device=device))


@pytest.mark.parametrize(("backend", "device"), READERS)
def test_float64_is_refused_or_exact(backend: str, device: str) -> None:
    check_call(Batch(((1, 33), (9, 20)), dtype="float64", num_kv_heads=2, group=4), backend, device)


@pytest.mark.parametrize(("backend", "device"), READERS)
def test_a_batch_without_query_tokens_gives_nothing(backend: str, device: str) -> None:
    for lens in ((), ((0, 0),), ((0, 7), (0, 0))):
        out, lse = Batch(lens).call(backend, device=device)
        assert out.shape == (0, 1, 64)
        assert lse.shape == (0, 1)


# ---- Writing


def check_write(write: Write, backend: str, device: str) -> None:
    """Raise AssertionError unless `backend` writes what the reference writes.

    Bytes that are no token's must be as before; what was written must be what the reference writes, or next to it."""
    before = write.tensors(device)
    wanted = write.run("reference", device)
    try:
        got = write.run(backend, device)
    except BackendUnsupportedError as refusal:
        check_refusal(refusal, backend)
        got = write.run(None, device)
    slots = before["slot_mapping"]
    assert slots is not None
    is_written = torch.zeros(write.num_blocks * write.block_size, dtype=torch.bool, device=device)
    is_written[slots[slots >= 0]] = True
    is_written = is_written.view(write.num_blocks, write.block_size)
    for name in ("key_cache", "value_cache", "k_scale", "v_scale"):
        old, new, reference = before[name], got[name], wanted[name]
        if old is None or new is None or reference is None:
            continue
        if name.endswith("scale") and old.ndim < 3:
            assert torch.equal(old, new), f"{name} was written to"
            continue
        old, new, reference = (tensor.contiguous() for tensor in (old, new, reference))
        assert torch.equal(old[~is_written].view(torch.uint8), new[~is_written].view(torch.uint8)), (
            f"{name} was written to beside the slots"
        )
        distance = _steps_between(new[is_written], reference[is_written])
        allowed = 0 if write.cache == "float" else 1
        assert distance <= allowed, f"{name} is {distance} codes away from the reference's"
    _check_round_trip(write, got)


def _steps_between(a: Tensor, b: Tensor) -> int:
    """How many representable numbers lie between, at most."""
    if not a.numel():
        return 0
    if a.dtype == torch.uint8:
        apart = torch.maximum((a.int() % 16 - b.int() % 16).abs(), (a.int() // 16 - b.int() // 16).abs())
        return int(apart.max())
    if a.dtype != torch.int8:
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        sign = torch.iinfo(bits).min
        # Sign and magnitude to one line of whole numbers; zero of either sign is zero.
        a, b = (torch.where(x < 0, sign - x, x) for x in (a.view(bits).long(), b.view(bits).long()))
    return int((a.long() - b.long()).abs().max())


def _check_round_trip(write: Write, got: dict[str, Tensor | None]) -> None:
    """What is read back is what was written, but for half a step: the reference itself is held to this."""
    slots = got["slot_mapping"]
    assert slots is not None
    wanted = slots >= 0
    places = (slots[wanted] // write.block_size, slots[wanted] % write.block_size)
    for name in ("key", "value"):
        new, cache, scale = got[name], got[f"{name}_cache"], got[f"{name[0]}_scale"]
        if new is None or cache is None:
            continue
        exact, codes = new[wanted].double(), cache[places]
        if write.cache == "float":
            assert torch.equal(exact, codes.double())
        elif write.cache == "int8":
            assert scale is not None
            step = scale[places].double()[..., None]
            assert ((codes.double() * step - exact).abs() <= 0.5001 * step).all()
        elif write.cache == "int4":
            assert scale is not None
            step, minimum = (
                part.double().repeat_interleave(exact.shape[-1] // scale.shape[3], -1)
                for part in scale[places].unbind(-1)
            )
            nibbles = torch.stack((codes % 16, codes // 16), -1).flatten(-2).double()
            # Step and minimum are rounded to bfloat16, 1 part in 256: at the end of 15 steps, or on the minimum.
            slack = 0.51 * step + 15 * step / 256 + minimum.abs() / 256
            assert ((nibbles * step + minimum - exact).abs() <= slack).all()
        else:
            factor = torch.ones((), dtype=torch.float64) if scale is None else scale.cpu().double()
            factor = factor.expand(write.num_kv_heads)[:, None].to(exact.device)
            largest = torch.finfo(cache.dtype).max
            ideal = (exact / factor).clamp(-largest, largest)
            mantissa_bits, smallest = (3, 2.0**-9) if write.cache == "fp8_e4m3" else (2, 2.0**-16)
            slack = ideal.abs() * 2.0 ** -(mantissa_bits + 1) * 1.001 + smallest / 2
            assert ((codes.double() - ideal).abs() <= slack).all()


@pytest.mark.parametrize(("backend", "device"), READERS)
def test_random_writes_store_what_the_reference_stores(backend: str, device: str) -> None:
    for seed in few(backend, device):
        check_write(random_write(seed), backend, device)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "device"), READERS)
def test_many_random_writes_store_what_the_reference_stores(backend: str, device: str) -> None:
    for seed in many(backend, device):
        check_write(random_write(seed), backend, device)


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize(("backend", "device"), READERS)
def test_a_write_of_every_format_stores_what_the_reference_stores(backend: str, device: str, cache: str) -> None:
    for dtype in DTYPES:
        check_write(Write(20, num_skipped=3, dtype=dtype, cache=cache, num_kv_heads=2), backend, device)
