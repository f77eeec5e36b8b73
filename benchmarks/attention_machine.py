"""What the machine gives while bench_attention.py runs: bandwidth of reading, rate of matrix products, and its cores."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SLOW_MATMUL_S = 0.01


@dataclass
class Machine:
    """What the machine gave at one moment."""

    read_gbps: float
    bf16_gflops: float
    fp32_gflops: float
    # Of the float32 product, CPU time by wall time: less than the number of threads means that others are at work.
    cores: float

    @classmethod
    def now(cls) -> Machine:
        """About 0.5 seconds."""
        bf16 = matmul_rate(torch.bfloat16)
        cpu_start, start = time.process_time(), time.perf_counter()
        fp32 = matmul_rate(torch.float32)
        cores = (time.process_time() - cpu_start) / (time.perf_counter() - start)
        return cls(read_bandwidth(), bf16, fp32, cores)

    @property
    def matmul_gflops(self) -> float:
        """The faster of bf16 and float32: without bf16 instructions a kernel widens, and float32 is what bounds it."""
        return max(self.bf16_gflops, self.fp32_gflops)

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
    numbers = probe()
    halves = numbers.view(2, -1)
    ways: tuple[Callable[[], object], ...] = (
        numbers.sum,
        numbers.amax,
        lambda: torch.linalg.vecdot(halves[0], halves[1]),
    )
    return max(numbers.nbytes / min(seconds_of(way) for _ in range(4)) / 1e9 for way in ways)


@functools.cache
def probe() -> Tensor:
    return torch.ones(64 << 20, dtype=torch.float32)


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two square matrices of 2,048; of 256 where that size alone takes too long.

    Without bf16 instructions torch's product of bf16 takes a hundred times as long as that of float32.
    """
    seconds = _matmulseconds_of(256, dtype)
    size = 2048 if seconds < SLOW_MATMUL_S else 256
    return 2 * size**3 / min(_matmulseconds_of(size, dtype) for _ in range(4)) / 1e9


def _matmulseconds_of(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return seconds_of(lambda: a @ b)


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
