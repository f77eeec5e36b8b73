"""How long does work on a GPU take? CUDA events around replays of a graph, and the limits that figures are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["NUM_REPEATS", "limits", "milliseconds"]

NUM_REPEATS = 7
MAX_REPLAY_S = 0.25


def milliseconds(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Median, least and most milliseconds of one call. The calls read different memory, and stand in one graph.

    A graph, for a kernel takes less time than Python needs to launch it; different memory, for else it came from the L2.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < NUM_REPEATS and time.perf_counter() - started < MAX_REPLAY_S):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def limits() -> dict[str, float]:
    """TB/s of a copy, read and written bytes together, and TFLOP/s of a product of random bfloat16 matrices."""
    source = torch.empty(2**31, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = milliseconds([lambda: target.copy_(source)])["median"]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    matmul_ms = milliseconds([lambda: torch.mm(a, b, out=product)] * 3)["median"]
    return {
        "copy_tb_per_s": 2 * source.numel() * 2 / copy_ms / 1e9,
        "matmul_tflop_per_s": 2 * 8192**3 / matmul_ms / 1e9,
    }
