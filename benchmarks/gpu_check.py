"""Is the Triton backend right on this GPU, and how close does it come to the GPU's limits?

`make gpu-check`, or `python benchmarks/gpu_check.py [--quick] [--sweep]`; the figures go to results/gpu_attention.json. Needs a
CUDA GPU, and of this project nothing but the checkout. Exit code 1 if a result is wrong, 2 without a GPU.

Reading a row: decodes and writes are held against a copy's bytes per second, prefills and the latent of MLA against a
matrix product's operations, both measured in the same run. "x sdpa" is the time of torch's attention over keys in one
piece, over ours: above 1 we are faster; FlashInfer stands beside it where it is installed, on the same blocks.
Caches are rotated, so that they come from memory, and blocks lie scattered unless said.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from harness import RESULTS, machine

Row = dict[str, Any]
Section = tuple[str, Callable[[dict[str, float]], list[Row]]]


def cases() -> dict[str, list[Any]]:
    """What is timed, by section."""
    from gpu_cases import Case

    latent: dict[str, Any] = {"heads": (128, 1), "dims": (576, 512), "is_latent": True, "block_size": 64}
    decode = [
        Case(f"decode {batch} x {length // 1024}k", ((batch, 1, length),))
        for batch in (1, 16, 64, 256)
        for length in (1024, 4096, 8192, 32768)
    ]
    codes = [
        Case(f"decode {batch} x {length // 1024}k {cache}", ((batch, 1, length),), cache=cache)
        for cache in ("fp8_e4m3", "int8", "int4")
        for batch, length in ((16, 8192), (64, 4096), (64, 8192))
    ]
    return {
        "decode, bfloat16": decode,
        "decode, other caches": codes,
        "decode, other shapes": [
            Case("decode 64 x 4k, blocks in order", ((64, 1, 4096),), is_scattered=False),
            Case("decode 64 x 4k, NHD", ((64, 1, 4096),), layout="NHD"),
            Case("decode 64 x 4k, blocks of 64", ((64, 1, 4096),), block_size=64),
            Case("decode 64 x 4k, blocks of 1", ((64, 1, 4096),), block_size=1),
            Case("decode 64 x 4k, 32 heads each their own", ((64, 1, 4096),), heads=(32, 32)),
            Case("decode 64 x 4k, head of 64", ((64, 1, 4096),), dims=(64, 64)),
            Case("decode 64 x 4k, head of 256", ((64, 1, 4096),), dims=(256, 256)),
            Case("decode ragged, 1 x 64k and 60 x 1k", ((1, 1, 65536), (60, 1, 1024))),
            Case("verify 64 x 4 tokens x 4k", ((64, 4, 4096),)),
        ],
        "prefill": [
            *(Case(f"prefill {length // 1024}k", ((1, length, length),)) for length in (4096, 8192, 16384)),
            *(Case(f"prefill chunk of {n} on 8k", ((1, n, 8192 + n),)) for n in (512, 1024, 2048)),
            Case("prefill 8k, fp8_e4m3", ((1, 8192, 8192),), cache="fp8_e4m3"),
            Case("prefill 8k, head of 64", ((1, 8192, 8192),), dims=(64, 64)),
            Case("mixed, chunk of 512 on 4k and 32 decodes of 4k", ((32, 1, 4096), (1, 512, 4608))),
        ],
        "latent of MLA": [
            Case("latent decode 16 x 4k", ((16, 1, 4096),), **latent),
            Case("latent decode 64 x 8k", ((64, 1, 8192),), **latent),
            Case("latent decode 64 x 8k fp8_e4m3", ((64, 1, 8192),), cache="fp8_e4m3", **latent),
        ],
        "write": [
            Case(f"write {count} tokens {cache}", ((1, count, count),), cache=cache, is_write=True)
            for cache in ("float", "fp8_e4m3", "int8", "int4")
            for count in (256, 8192)
        ],
    }


def kind_of(case: Any) -> Any:
    """What cases that need the same kernels have in common."""
    return dataclasses.replace(case.shrunk(), name="")


def time_section(section: list[Any], limit: dict[str, float], left_out: dict[Any, str]) -> list[Row]:
    """Rows of a section; cases of one shape share a cache. left_out: kinds that do not run, and why."""
    from gpu_cases import Pool
    from gpu_peers import sdpa
    from gpu_timing import milliseconds

    rows = []
    pool, made_for = None, None
    for case in section:
        if kind_of(case) in left_out:
            rows.append({"what": case.name, "left_out": left_out[kind_of(case)]})
            print(f"  {case.name}: left out, {left_out[kind_of(case)]}", flush=True)
            continue
        if case.pool_kind != made_for:
            # The old one has to go before the new one comes.
            pool = None
            torch.cuda.empty_cache()
            alike = [c for c in section if c.pool_kind == case.pool_kind]
            most = max(c.num_blocks for c in alike)
            pool, made_for = (
                Pool(case, max(most, 4 * min(c.num_blocks for c in alike), 2**17 // case.block_size)),
                case.pool_kind,
            )
        assert pool is not None
        figures = milliseconds(pool.calls(case))
        row = {"what": case.name, **figures, **_rates(case, figures["median"], limit)}
        for name, calls in (("sdpa", sdpa(case)), ("flashinfer", pool.flashinfer_calls(case))):
            if calls is not None:
                row[name] = milliseconds(calls)["median"] / figures["median"]
        rows.append(row)
        _print(row)
    return rows


def _rates(case: Any, ms: float, limit: dict[str, float]) -> Row:
    # A write reads bfloat16 and writes what is stored.
    num_bytes = case.num_bytes + (
        2 * sum(q for q, _ in case.seqs) * case.heads[1] * sum(case.dims) if case.is_write else 0
    )
    rate, flops = num_bytes / ms / 1e9, case.num_flops / ms / 1e9
    is_compute = not case.is_write and case.num_flops / case.num_bytes > 128
    share = flops / limit["matmul_tflop_per_s"] if is_compute else rate / limit["copy_tb_per_s"]
    return {"tb_per_s": rate, "tflop_per_s": 0.0 if case.is_write else flops, "share_of_limit": share}


def _print(row: Row) -> None:
    peers = "".join(f", {row[name]:.2f} x {name}" for name in ("sdpa", "flashinfer") if name in row)
    print(
        f"  {row['what']}: {row['median'] * 1000:.1f} us ({row['min'] * 1000:.1f} to {row['max'] * 1000:.1f}), "
        f"{row['tb_per_s']:.2f} TB/s, {row['tflop_per_s']:.0f} TFLOP/s, {row['share_of_limit']:.0%} of the limit{peers}",
        flush=True,
    )


def plan_rows(_: dict[str, float]) -> list[Row]:
    """Host time of a plan, its copy to the device included."""
    import numpy as np

    from pagedkv.attention import plan

    lengths = np.full(256, 4096, np.int32)
    starts = np.arange(257, dtype=np.int32)
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        plan(lengths, starts, num_q_heads=32, num_kv_heads=8, device="cuda", backend="triton")
        times.append((time.perf_counter() - begun) * 1000)
    row = {"what": "plan of 256 decodes, host", "median": sorted(times)[15], "min": min(times), "max": max(times)}
    print(f"  {row['what']}: {row['median'] * 1000:.0f} us")
    return [row]


def swap_section(_: dict[str, float]) -> list[Row]:
    """Swaps of 1,000 scattered blocks between host and device, against one large pinned copy."""
    from bench_swap import swap_rows

    rows = swap_rows("cuda")
    for row in rows:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def engine_section(limit: dict[str, float]) -> list[Row]:
    """Decode steps of a whole model, with and without CUDA graphs, against `generate` of transformers."""
    import gpu_engine

    return gpu_engine.figures(limit)


# Sections that are no lists of cases: a name, and what gives their rows for the run's limits.
MORE_SECTIONS: list[Section] = [
    ("plan", plan_rows),
    ("swap", swap_section),
    ("engine, decode", engine_section),
]


def sweep(workers: ProcessPoolExecutor) -> list[Row]:
    """For each of a few shapes, the fastest tiles: what `tiles.py` should say."""
    from gpu_cases import Case, Pool
    from gpu_tiles import candidates, use_tile, warm_tile
    from gpu_timing import milliseconds

    rows = []
    for name, lens, more in (
        ("decode", ((64, 1, 4096),), {}),
        ("decode fp8_e4m3", ((64, 1, 4096),), {"cache": "fp8_e4m3"}),
        ("decode int8", ((64, 1, 4096),), {"cache": "int8"}),
        ("decode int4", ((64, 1, 4096),), {"cache": "int4"}),
        ("decode head of 256", ((64, 1, 4096),), {"dims": (256, 256)}),
        ("prefill", ((1, 8192, 8192),), {}),
        ("prefill head of 64", ((1, 8192, 8192),), {"dims": (64, 64)}),
        (
            "latent decode",
            ((64, 1, 4096),),
            {"heads": (128, 1), "dims": (576, 512), "is_latent": True, "block_size": 64},
        ),
    ):
        case = Case(name, lens, **more)
        tiles = candidates(case)
        reasons = list(workers.map(warm_tile, [case] * len(tiles), tiles))
        fits = [tile for tile, why in zip(tiles, reasons, strict=True) if why is None]
        pool = Pool(case, max(case.num_blocks, 2**17 // case.block_size))
        found = []
        for tile in fits:
            with use_tile(tile):
                found.append((milliseconds(pool.calls(case))["median"], tile))
        found.sort(key=lambda pair: pair[0])
        del pool
        torch.cuda.empty_cache()
        left_out = [
            {"left_out": why, **dataclasses.asdict(tile)} for tile, why in zip(tiles, reasons, strict=True) if why
        ]
        tried = [{"ms": ms, **dataclasses.asdict(tile)} for ms, tile in found]
        rows.append({"what": name, "tiles": tried + left_out})
        print(f"  {name}: " + "; ".join(f"{ms * 1000:.1f} us {tile}" for ms, tile in found[:3]), flush=True)
    return rows


def main() -> int:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="correctness only")
    parser.add_argument("--sweep", action="store_true", help="try tiles too, and print the best of each shape")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: there is no CUDA GPU here", file=sys.stderr)
        return 2
    import gpu_correctness
    import gpu_engine
    import triton
    from gpu_cases import warm
    from gpu_timing import limits

    begun = time.perf_counter()
    about: dict[str, Any] = {
        **machine(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with gpu_correctness.pool() as workers:
        sections = {} if options.quick else cases()
        # Compiled while the checks run.
        kinds = {kind_of(c): c for section in sections.values() for c in section}
        warming = {kind: workers.submit(warm, case) for kind, case in kinds.items()}
        wrong = gpu_correctness.check_all(workers) + gpu_engine.check_all()
        for line in wrong:
            print(f"WRONG {line}")
        if options.quick:
            return 1 if wrong else 0
        left_out = {kind: why for kind, future in warming.items() if (why := future.result())}
        swept = sweep(workers) if options.sweep else []
    limit = limits()
    print(f"copy {limit['copy_tb_per_s']:.2f} TB/s, bfloat16 product {limit['matmul_tflop_per_s']:.0f} TFLOP/s")
    content: dict[str, Any] = {"about": about, "wrong": wrong, "limits": limit, "sweep": swept, "sections": {}}
    timed: list[Section] = [
        (name, lambda limit, section=section: time_section(section, limit, left_out))
        for name, section in sections.items()
    ]
    for name, section_rows in [*timed, *MORE_SECTIONS]:
        print(f"{name} ({time.perf_counter() - begun:.0f} s)", flush=True)
        content["sections"][name] = section_rows(limit)
        torch.cuda.empty_cache()
        # After each section, so that a run that is cut short leaves what it has.
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu_attention.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"done in {time.perf_counter() - begun:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
