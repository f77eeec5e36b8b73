"""What do `plan`, `paged_attention` and `write_kv` cost on a CPU beside the kernel?

A step plans once and calls the other two once per layer. Their tensors are so small here (one sequence of one token, one
head) that what is left of a call is Python and torch's dispatch; the call of the compiled kernel alone stands beside it.
A step's first layer is checked; the next ones, whose tensors lie alike, are only compared with it, and past the dispatcher.
Where it loses: without a plan, the call makes one itself, and checks it, in each layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, repeat

from pagedkv.attention import paged_attention, plan, write_kv
from pagedkv.attention.backends import backend_named
from pagedkv.attention.cpu.backend import CPUBackend

NUM_CALLS = 2000
TARGETS_US = {
    "decodes": 45,
    "decodes and 8 chunks": 45,
    "paged_attention, planned, first layer": 27,
    "paged_attention, planned": 7,
    "write_kv, first layer": 21,
    "write_kv": 7,
}


def median_us(function: Callable[[], Any]) -> float:
    """Microseconds of this thread's CPU, the median of many calls, less what reading the clock takes."""

    def medians(of: Callable[[], Any]) -> float:
        nanoseconds = []
        for _ in range(NUM_CALLS):
            start = time.thread_time_ns()
            of()
            nanoseconds.append(time.thread_time_ns() - start)
        return statistics.median(nanoseconds) / 1e3

    return medians(function) - medians(lambda: None)


def plans() -> dict[str, Callable[[], Any]]:
    """`plan` for 256 ragged sequences."""
    rng = np.random.default_rng(0)
    made: dict[str, Callable[[], Any]] = {}
    for name, num_queries in (
        ("decodes", np.ones(256, np.int32)),
        ("decodes and 8 chunks", np.where(np.arange(256) % 32 == 0, 256, 1).astype(np.int32)),
    ):
        lens = (rng.integers(1, 8192, 256) + num_queries).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(num_queries))).astype(np.int32)
        made[name] = lambda lens=lens, starts=starts: plan(lens, starts, num_q_heads=32, num_kv_heads=8, backend="cpu")
    return made


def calls() -> dict[str, Callable[[], Any]]:
    """One layer of one token, and the compiled kernel with what the last such call handed over.

    In a first layer something lies otherwise than in the call before: the plan is new, or there are more slots.
    """
    query, key_cache, value_cache = torch.zeros(1, 1, 16), torch.zeros(4, 16, 1, 16), torch.zeros(4, 16, 1, 16)
    tables, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    starts, slots = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0])
    step = plan(lens, starts, num_q_heads=1, num_kv_heads=1, backend="cpu")
    out = torch.empty_like(query)
    operands = (query, key_cache, value_cache, tables, lens, starts)
    new = (query, query, key_cache, value_cache, slots)
    other = (query, query, torch.zeros(5, 16, 1, 16), torch.zeros(5, 16, 1, 16), slots)
    turns = itertools.cycle((new, other))

    def first_layer() -> None:
        step.known = None
        paged_attention(*operands, plan=step, out=out)

    return {
        "paged_attention, planned, first layer": first_layer,
        "paged_attention, planned": lambda: paged_attention(*operands, plan=step),
        "paged_attention, planned, out given": lambda: paged_attention(*operands, plan=step, out=out),
        "paged_attention, not planned": lambda: paged_attention(*operands, backend="cpu"),
        "kernel of paged_attention alone": kernel_alone("attend", first_layer, (step, out, operands)),
        "write_kv, first layer": lambda: write_kv(*next(turns), backend="cpu"),
        "write_kv": lambda: write_kv(*new, backend="cpu"),
        "write_kv, slots not checked": lambda: write_kv(*new, check_slots=False, backend="cpu"),
        "kernel of write_kv alone": kernel_alone(
            "write", lambda: [write_kv(*one, backend="cpu") for one in (other, new)], (other, new)
        ),
    }


def kernel_alone(name: str, call: Callable[[], Any], owners: object) -> Callable[[], Any]:
    """The kernel's own call with the structure that `call` fills; `owners` are the tensors that it points to."""
    backend = backend_named("cpu")
    if not isinstance(backend, CPUBackend):
        raise TypeError("the cpu backend is not the compiled kernel's")
    original = getattr(backend.kernel, name)
    filled: list[Any] = []
    setattr(backend.kernel, name, lambda c, _num_threads: filled.append(c))
    try:
        call()
    finally:
        delattr(backend.kernel, name)
    kept = (filled[-1], owners)
    return lambda: original(kept[0], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, not to benchmarks/results/")
    arguments = parser.parse_args()
    # One thread does all the work, so that its CPU time is the whole cost.
    torch.set_num_threads(1)
    report = Report(__doc__ or "", has_options=True)
    for prefix, group in (("plan of 256 ragged sequences, ", plans()), ("", calls())):
        for name, function in group.items():
            target = {"target_us": TARGETS_US[name]} if name in TARGETS_US else {}
            report.add(prefix + name, repeat(lambda f=function: median_us(f)), "us", **target)
    if arguments.json is None:
        report.write()
    else:
        arguments.json.write_text(json.dumps({"machine": report.machine, "rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
