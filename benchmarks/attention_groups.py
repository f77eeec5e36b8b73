"""The groups of cases that bench_attention.py runs: which operators race on which batches, and which lines that feeds."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from attention_cases import Case, Data, Paged
from attention_machine import seconds_of
from attention_peers import Op, sdpa_op
from attention_race import Bench, Timing
from harness import spread
from torch import Tensor

from pagedkv.attention import backend_info, paged_attention, plan, write_kv
from pagedkv.attention.backends import backend_named, pick_for_device

QUANTISED = {
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int4": torch.uint8,
}


def ours(data: Data, paged: Paged, backend: str, name: str | None = None, truth: Tensor | None = None) -> Op:
    """`paged_attention` by a backend, planned beforehand."""
    tables = torch.from_numpy(paged.tables)
    lens, starts = torch.from_numpy(data.seq_lens), torch.from_numpy(data.starts)
    out = torch.empty(data.case.num_tokens, data.case.heads[0], data.case.dims[1], dtype=data.case.dtype)
    q_heads, kv_heads = data.case.heads

    def make_plan() -> Any:
        return plan(data.seq_lens, data.starts, num_q_heads=q_heads, num_kv_heads=kv_heads, backend=backend)

    made = make_plan()

    def run(i: int) -> Tensor:
        paged_attention(
            data.query,
            paged.keys[i],
            paged.values[i],
            tables,
            lens,
            starts,
            k_scale=paged.k_scales[i],
            v_scale=paged.v_scales[i],
            out=out,
            plan=made,
        )
        return out

    return Op(name or backend, run, plan=make_plan, num_bytes=paged.num_bytes, truth=truth)


def available() -> list[str]:
    """Backends to time. Not the reference, which has a group of its own."""
    names = [info.name for info in backend_info() if info.is_available and backend_named(info.name).runs_on("cpu")]
    return [name for name in names if name != "reference"]


def fastest() -> str:
    return pick_for_device(torch.device("cpu")).name


def everyone(bench: Bench, case: Case, *, is_compute: bool = False) -> dict[str, Timing]:
    """Race un-paged attention, each backend, and vLLM's operator if it is there."""
    data = Data(case)
    paged = Paged.of(data)
    ops = [sdpa_op(data), *(ours(data, paged, name) for name in available())]
    if bench.vllm.why_not is None:
        ops.append(bench.vllm.op(data))
    timings = bench.race(data, ops)
    bench.rows(data, ops, timings, is_compute=is_compute)
    return timings


def decode(bench: Bench, is_quick: bool) -> None:
    shapes = [(c, b) for c in (4096, 8192, 16384) for b in (1, 4, 16)]
    for context, num_seqs in shapes[:2] if is_quick else shapes:
        case = Case(f"decode bf16, {num_seqs} x {context}", ((1, context),) * num_seqs)
        timings = everyone(bench, case)
        best = fastest()
        bench.ratio_line("decode bf16, x SDPA", case.name, timings, "sdpa", best)
        bench.line("decode bf16, share of read bandwidth", case.name, bench.figure(case.name, best, "share_of_read"))
        bench.ratio_line("decode bf16, x vLLM CPU", case.name, timings, "vllm-cpu", best)
        if context == 4096:
            bench.ratio_line("torch backend, decode at 4k, x SDPA", case.name, timings, "sdpa", "torch")


def decode_fp32(bench: Bench, is_quick: bool) -> None:
    shapes = [(4096, 1), (4096, 4), (4096, 16), (16384, 4)]
    for context, num_seqs in shapes[:1] if is_quick else shapes:
        case = Case(f"decode fp32, {num_seqs} x {context}", ((1, context),) * num_seqs, dtype=torch.float32)
        timings = everyone(bench, case)
        bench.ratio_line("decode fp32, x SDPA", case.name, timings, "sdpa", fastest())


def prefill(bench: Bench, is_quick: bool) -> None:
    shapes = [(n, prefix) for n in (512, 1024, 2048) for prefix in (0, 2048, 8192)]
    for num_queries, prefix in shapes[:2] if is_quick else shapes:
        case = Case(f"prefill bf16, {num_queries} on {prefix}", ((num_queries, prefix + num_queries),))
        timings = everyone(bench, case, is_compute=True)
        best = fastest()
        bench.ratio_line("prefill bf16, x SDPA", case.name, timings, "sdpa", best)
        bench.ratio_line("prefill bf16, x vLLM CPU", case.name, timings, "vllm-cpu", best)
        sdpa_share = bench.figure(case.name, "sdpa", "share_of_matmul")
        if sdpa_share:
            bench.line("prefill bf16, x SDPA if at the matmul rate", case.name, 1 / sdpa_share)
        bench.line("prefill bf16, share of matmul", case.name, bench.figure(case.name, best, "share_of_matmul"))


def reference(bench: Bench, is_quick: bool) -> None:
    """By itself: after all the memory that it takes and gives back, the next operator but one is a tenth slower."""
    for name, dtype in {"bf16": torch.bfloat16, **({} if is_quick else {"fp32": torch.float32})}.items():
        data = Data(Case(f"reference {name}, 1 x 4096", ((1, 4096),), dtype=dtype))
        ops = [sdpa_op(data), ours(data, Paged.of(data), "reference")]
        bench.rows(data, ops, bench.race(data, ops), is_compute=False)


def mixed(bench: Bench, is_quick: bool) -> None:
    del is_quick
    case = Case("mixed bf16, 512 queries and 15 decodes on 4608", ((512, 4608), *((1, 4608),) * 15))
    timings = everyone(bench, case, is_compute=True)
    bench.ratio_line("mixed, x SDPA loop", case.name, timings, "sdpa", fastest())


def quantised(bench: Bench, is_quick: bool) -> None:
    shapes = [(4096, 4), (4096, 16), (16384, 4)]
    for context, num_seqs in shapes[:1] if is_quick else shapes:
        case = Case(f"decode, quantised, {num_seqs} x {context}", ((1, context),) * num_seqs)
        data = Data(case)
        ops = [ours(data, Paged.of(data), fastest(), "bf16")]
        for name, dtype in QUANTISED.items():
            paged = Paged.of(data, cache=dtype)
            # Against the numbers that its codes mean: what quantising costs in accuracy is not the kernel's doing.
            ops.append(ours(data, paged, fastest(), name, data.truth(paged.numbers(data))))
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
        for name in QUANTISED:
            bench.ratio_line(f"decode {name}, x its own bf16", case.name, timings, "bf16", name)


def scattered(bench: Bench, is_quick: bool) -> None:
    shapes = [(4096, 16), (16384, 4)]
    for context, num_seqs in shapes[:1] if is_quick else shapes:
        case = Case(f"decode, blocks, {num_seqs} x {context}", ((1, context),) * num_seqs)
        data = Data(case)
        ops = [
            ours(data, Paged.of(data, is_scattered=is_scattered, is_hnd=is_hnd), fastest(), name)
            for name, is_scattered, is_hnd in (
                ("consecutive NHD", False, False),
                ("scattered NHD", True, False),
                ("consecutive HND", False, True),
                ("scattered HND", True, True),
            )
        ]
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
        # HND is what KVStorage lays out unless told otherwise.
        for layout, line in (("HND", "scattered blocks"), ("NHD", "scattered blocks, NHD")):
            bench.ratio_line(
                f"{line}, x consecutive", case.name, timings, f"consecutive {layout}", f"scattered {layout}"
            )
        bench.ratio_line("HND, x NHD", case.name, timings, "scattered NHD", "scattered HND")


def heads(bench: Bench, is_quick: bool) -> None:
    del is_quick
    for name, kv_heads in (("MHA", 32), ("MQA", 1)):
        case = Case(f"decode bf16, {name}, 4 x 4096", ((1, 4096),) * 4, heads=(32, kv_heads))
        data = Data(case)
        ops = [sdpa_op(data), ours(data, Paged.of(data), fastest())]
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
        bench.ratio_line(f"{name} decode, x SDPA", case.name, timings, "sdpa", fastest())


def latent(bench: Bench, is_quick: bool) -> None:
    shapes = [(4096, 1), (4096, 16)]
    for context, num_seqs in shapes[:1] if is_quick else shapes:
        case = Case(
            f"MLA decode bf16, {num_seqs} x {context}",
            ((1, context),) * num_seqs,
            heads=(16, 1),
            dims=(576, 512),
            is_latent=True,
        )
        data = Data(case)
        ops = [sdpa_op(data), ours(data, Paged.of(data), fastest())]
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
        bench.ratio_line("MLA decode, x SDPA", case.name, timings, "sdpa", fastest())


def writing(bench: Bench, is_quick: bool) -> None:
    num_tokens, shape = 2048, (2048, 16, 8, 128)
    keys, values = torch.randn(2, num_tokens, 8, 128).bfloat16()
    rng = np.random.default_rng(0)
    slots = [torch.from_numpy(rng.permutation(shape[0] * shape[1])[:num_tokens]) for _ in range(8)]
    for name, dtype in {"bf16": torch.bfloat16, **({} if is_quick else QUANTISED)}.items():
        paged = Paged.of(Data(Case("write", ((1, shape[0] * shape[1]),), cache=dtype)))
        moved = 2 * keys.nbytes + paged.num_bytes * num_tokens // (shape[0] * shape[1])
        for backend in (info.name for info in backend_info() if info.is_available):
            scales = {"k_scale": paged.k_scales[0], "v_scale": paged.v_scales[0]}

            def once(i: int, backend: str = backend, paged: Paged = paged, scales: dict[str, Any] = scales) -> None:
                write_kv(keys, values, paged.keys[0], paged.values[0], slots[i], **scales, backend=backend)

            once(0)
            milliseconds = [1e3 * seconds_of(lambda i=i, once=once: once(i)) for i in range(8)]
            gbps = moved / statistics.median(milliseconds) / 1e6
            bench.report.add(
                f"write_kv {name}, 2048 tokens: {backend}", spread(milliseconds), "ms", gbps=round(gbps, 2)
            )


def planning(bench: Bench, is_quick: bool) -> None:
    del is_quick
    rng = np.random.default_rng(0)
    for name, num_queries in (
        ("decodes", np.ones(256, np.int32)),
        ("decodes and 8 chunks", np.where(np.arange(256) % 32 == 0, 256, 1).astype(np.int32)),
    ):
        lens = (rng.integers(1, 8192, 256) + num_queries).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(num_queries))).astype(np.int32)
        microseconds = []
        for _ in range(200):
            start = time.thread_time()
            plan(lens, starts, num_q_heads=32, num_kv_heads=8)
            microseconds.append(1e6 * (time.thread_time() - start))
        figures = spread(microseconds[20:])
        bench.report.add(f"plan of 256 ragged sequences, {name}", figures, "us")
        bench.line("plan of 256 ragged sequences, us", name, figures["median"])


GROUPS = {
    "decode": decode,
    "fp32": decode_fp32,
    "prefill": prefill,
    "mixed": mixed,
    "quantised": quantised,
    "blocks": scattered,
    "heads": heads,
    "reference": reference,
    "latent": latent,
    "write": writing,
    "plan": planning,
}
