"""How fast do blocks move between device and host, and which order of memory is best for that and for attention?

Yardstick: one copy of the same bytes in one piece, pinned where the device is a GPU. Wall-clock time, for torch copies with
several threads. All candidates take turns, so that a busy machine slows all of them down.

`python benchmarks/bench_swap.py [--device cuda]`; on CUDA the results go to results/swap_cuda.json.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch
from harness import repeat, spread, time_once
from torch import Tensor

from pagedkv import BlockCopies
from pagedkv.arrays import cdiv
from pagedkv.attention import backend_info, paged_attention
from pagedkv.storage import KVSpec, KVStorage, Moves
from pagedkv.storage.moves import runs_of
from pagedkv.storage.tensors import GRAIN_WORDS

NUM_MOVED = 1000
NUM_BLOCKS = 1250
NUM_REPEATS = 7
MODELS = {
    "Llama-3-8B, blocks of 2 MiB": KVSpec(32, 8, 128),
    "Qwen2.5-0.5B, blocks of 192 KiB": KVSpec(24, 2, 64),
}
Row = dict[str, Any]


def take_turns(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, one warm-up and `NUM_REPEATS` for the record, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(NUM_REPEATS + 1):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scattered(rng: np.random.Generator, run: int) -> BlockCopies:
    """`NUM_MOVED` blocks in runs of `run` neighbours, no two runs in a row."""

    def some() -> np.ndarray:
        starts = rng.permutation(NUM_BLOCKS // run)[: NUM_MOVED // run] * run
        return (starts[:, None] + np.arange(run)).reshape(-1)

    return BlockCopies(some(), some())


def swap_rows(device: torch.device | str) -> list[Row]:
    """Rates of swaps, as rows of a report: GB/s, and the share of one large copy's rate."""
    device = torch.device(device)
    return list(itertools.chain.from_iterable(_swap_rows(name, spec, device) for name, spec in MODELS.items()))


def _swap_rows(model: str, spec: KVSpec, device: torch.device) -> list[Row]:
    rng = np.random.default_rng(0)
    storage = KVStorage(spec, NUM_BLOCKS, device, NUM_BLOCKS)
    on_device, on_host = storage._buffers["device"], storage._buffers["host"]
    on_device.fill_(1)
    on_host.fill_(2)
    single, runs = scattered(rng, 1), scattered(rng, 10)
    saved = torch.ones_like(on_host[:NUM_MOVED])
    half = NUM_MOVED // 2
    copies = BlockCopies(rng.permutation(half), half + rng.permutation(half))
    outward = {
        "one large copy": lambda: on_host[:NUM_MOVED].copy_(on_device[:NUM_MOVED], non_blocking=True),
        "scattered blocks": lambda: storage.apply(Moves(swaps_out=single)),
        "runs of 10": lambda: storage.apply(Moves(swaps_out=runs)),
        "layer by layer (rejected)": lambda: layer_major_copy(spec, on_host, on_device, single),
        "targets saved first (rejected)": lambda: saving_copy(storage, saved, single),
    }
    inward = {
        "one large copy": lambda: on_device[:NUM_MOVED].copy_(on_host[:NUM_MOVED], non_blocking=True),
        "scattered blocks": lambda: storage.apply(Moves(swaps_in=single)),
        "runs of 10": lambda: storage.apply(Moves(swaps_in=runs)),
        "layer by layer (rejected)": lambda: layer_major_copy(spec, on_device, on_host, single),
    }
    within = {
        "one large copy": lambda: on_device[half:NUM_MOVED].copy_(on_device[:half]),
        "scattered blocks": lambda: storage.apply(Moves(copies=copies)),
    }
    rows = []
    for way, calls, num_blocks in (("out", outward, NUM_MOVED), ("in", inward, NUM_MOVED), ("copy", within, half)):
        num_bytes = num_blocks * spec.bytes_per_block
        seconds = take_turns(calls, device)
        large = spread(seconds["one large copy"])["median"]
        for name, values in seconds.items():
            figures = spread([num_bytes / value / 1e9 for value in values])
            share = large / spread(values)["median"]
            rows.append({"what": f"{model}: {way}, {name}", "unit": "GB/s", **figures, "share": round(share, 3)})
    return rows


def layer_major_copy(spec: KVSpec, targets: Tensor, sources: Tensor, moves: BlockCopies) -> None:
    """The same bytes if each layer had a buffer of its own: as many copies per block as there are layers."""
    shape = (spec.num_layers, NUM_BLOCKS, -1)
    num_pieces = cdiv(spec.bytes_per_layer // 8, GRAIN_WORDS) if targets.is_cpu and sources.is_cpu else 1
    into, out_of = targets.view(torch.int64).view(shape), sources.view(torch.int64).view(shape)
    pairs = list(zip(moves.sources.tolist(), moves.targets.tolist(), strict=True))
    torch._foreach_copy_(
        [piece for layer in into for _, target in pairs for piece in layer[target].chunk(num_pieces)],
        [piece for layer in out_of for source, _ in pairs for piece in layer[source].chunk(num_pieces)],
        non_blocking=True,
    )


def saving_copy(storage: KVStorage, saved: Tensor, moves: BlockCopies) -> None:
    """What it would cost to keep the old bytes of the targets until all copies are made."""
    runs = runs_of(moves.targets, np.arange(len(moves)))
    torch._foreach_copy_(storage._targets(saved, runs), storage._sources(storage._buffers["host"], runs))
    storage.apply(Moves(swaps_out=moves))


def read_rows(device: torch.device | str) -> list[Row]:
    """Seconds of a decode step's attention in 8 layers, by order of memory, for every backend that runs here."""
    device = torch.device(device)
    spec, num_seqs, num_blocks_each = KVSpec(8, 8, 128), 8, 64
    num_blocks = num_seqs * num_blocks_each
    rng = np.random.default_rng(0)
    storage = KVStorage(spec, num_blocks, device)
    block_major = [(storage.key_cache(layer), storage.value_cache(layer)) for layer in range(spec.num_layers)]
    for pair in block_major:
        for view in pair:
            view.normal_()
    # A storage of its own for each layer: the same layout and memory, blocks as near to each other as they can be.
    one_layer = [KVStorage(KVSpec(1, 8, 128), num_blocks, device) for _ in block_major]
    layer_major = [(storage.key_cache(0), storage.value_cache(0)) for storage in one_layer]
    for pair, others in zip(layer_major, block_major, strict=True):
        for view, other in zip(pair, others, strict=True):
            view.copy_(other)
    table = torch.from_numpy(rng.permutation(num_blocks).reshape(num_seqs, -1).astype(np.int32)).to(device)
    lengths = torch.full((num_seqs,), num_blocks_each * spec.block_size, dtype=torch.int32, device=device)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    query = torch.randn(num_seqs, 32, 128, device=device).bfloat16()

    def attend(layers: list[tuple[Tensor, ...]], backend: str) -> None:
        for key, value in layers:
            paged_attention(query, key, value, table, lengths, starts, backend=backend)

    rows = []
    for info in backend_info():
        if not info.is_available or info.name == "reference":  # That one is not meant to be fast.
            continue
        try:
            attend(block_major[:1], info.name)
        except NotImplementedError:
            continue
        calls = {
            "one buffer per layer": lambda name=info.name: attend(layer_major, name),
            "blocks of all layers": lambda name=info.name: attend(block_major, name),
        }
        seconds = take_turns(calls, device)
        base = spread(seconds["one buffer per layer"])["median"]
        for name, values in seconds.items():
            figures = spread([value * 1e3 for value in values])
            what = f"decode of {num_seqs} x {int(lengths[0])} tokens, {info.name} backend: {name}"
            rows.append({"what": what, "unit": "ms", **figures, "times": round(figures["median"] / base / 1e3, 3)})
    return rows


def overhead_rows() -> list[Row]:
    """Microseconds of CPU per call of `apply` on blocks of 64 bytes: what a step pays however little it moves."""
    storage = KVStorage(KVSpec(1, 1, 16, dtype="float16", block_size=1), NUM_BLOCKS, host_blocks=NUM_BLOCKS)
    rows, rng = [], np.random.default_rng(0)
    for num_moved in (0, 1, 10, 1000):
        swaps = BlockCopies(*(rng.permutation(NUM_BLOCKS)[:num_moved] for _ in range(2)))
        plan, num_calls = Moves(swaps_out=swaps), 20_000 // (num_moved + 20)
        figures = repeat(
            lambda plan=plan, n=num_calls: time_once(lambda: [storage.apply(plan) for _ in range(n)]) / n * 1e6,
            NUM_REPEATS,
        )
        rows.append({"what": f"apply of {num_moved} tiny scattered blocks", "unit": "us", **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    report = harness.Report(__doc__ or "", has_options=True)
    report.name = "swap" if device.type == "cpu" else f"swap_{device.type}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    report.machine |= {"torch": torch.__version__, "device": name}
    for row in itertools.chain(swap_rows(device), read_rows(device), overhead_rows()):
        figures = {key: row.pop(key) for key in ("median", "min", "max")}
        report.add(row.pop("what"), figures, row.pop("unit"), **row)
    report.write()


if __name__ == "__main__":
    main()
