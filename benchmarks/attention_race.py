"""How bench_attention.py times operators: each checked first, then all in turn, and reading itself with them."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from attention_cases import Data
from attention_machine import Machine, probe, seconds_of
from attention_peers import Op, VllmCpu
from harness import Report, spread

MIN_ROUNDS, MAX_ROUNDS = 5, 15
SECONDS_PER_CASE = 2.5


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
        cost = sum(seconds_of(lambda op=op: op.run(0)) for op in right)
        self.settle()
        num_rounds = int(np.clip(SECONDS_PER_CASE / max(cost, 1e-6), MIN_ROUNDS, MAX_ROUNDS))
        gc.collect()
        numbers = probe()
        self.reads = []
        for round_idx in range(num_rounds):
            self.reads.append(numbers.nbytes / seconds_of(numbers.amax) / 1e9)
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
        matmul = (self.before.matmul_gflops + after.matmul_gflops) / 2
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
            more |= {"read_gbps": round(read, 1), "matmul_gflops": round(matmul), "cores": round(after.cores, 2)}
            if op.plan is not None:
                more["plan_us"] = round(1e6 * statistics.median(seconds_of(op.plan) for _ in range(15)), 1)
            self.report.add(f"{data.case.name}: {op.name}", spread(timing.wall), "ms", **more)

    def figure(self, what: str, op_name: str, key: str) -> float | None:
        """A figure of a row that stands in the report."""
        return next((float(row[key]) for row in self.report.rows if row["what"] == f"{what}: {op_name}"), None)


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times as fast: the median over rounds, for in one round both met the same load."""
    return statistics.median(a / b for a, b in zip(slow.wall, fast.wall, strict=True))
