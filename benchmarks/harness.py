"""What every benchmark shares: timing, the yardstick around it, and results as JSON with machine and commit."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from yardstick import yardstick_ms

import pagedkv

RESULTS = Path(__file__).parent / "results"
NUM_REPEATS = 5


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_once(function: Callable[[], Any]) -> float:
    """Seconds of this thread's CPU for one call, the garbage of set-up frozen away."""
    gc.collect()
    gc.freeze()
    start = time.thread_time()
    function()
    seconds = time.thread_time() - start
    gc.unfreeze()
    return seconds


def repeat(measure: Callable[[], float], num_repeats: int = NUM_REPEATS) -> dict[str, float]:
    """Call `measure`, which returns one figure, once to warm up and `num_repeats` times for the record."""
    measure()
    return spread([measure() for _ in range(num_repeats)])


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = RESULTS.parents[1]
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=root)


def _commit() -> str:
    """The commit that runs, "-dirty" if the code was changed since; "unknown" without git, or outside of a repository."""
    # Results that the same series has just written do not make the code another one.
    code = [".", ":!benchmarks/results", ":!docs"]
    try:
        head = _git("rev-parse", "--short", "HEAD").stdout.strip()
        is_changed = _git("diff", "--quiet", "HEAD", "--", *code).returncode != 0
    except FileNotFoundError:
        return "unknown"
    return f"{head}{'-dirty' if is_changed else ''}" if head else "unknown"


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return {
        "cpu": model,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pagedkv": pagedkv.__version__,
        "commit": _commit(),
    }


def with_instruction_set(name: str) -> str:
    """The name of results that depend on it: as it is with AVX-512 alone, else with the set of the C kernel in it."""
    from pagedkv.attention.cpu.backend import CPUBackend  # Most benchmarks need no torch.

    backend = CPUBackend()
    sets = ["torch"] if backend.unavailable() else backend.kernel.in_use
    best = "amx" if "amx" in sets else sets[-1]
    return name if best == "avx512" else f"{name}_{best}"


def know_only_help(doc: str) -> None:
    """Show the beginning of a benchmark's docstring for `--help`; refuse all other arguments."""
    argparse.ArgumentParser(description=doc.strip().split("\n\n")[0]).parse_args()


class Report:
    """Collects rows, each with the yardstick measured right after it, prints them and writes them.

    has_options: whether the benchmark has options of its own, and has parsed them
    """

    def __init__(self, question: str, *, has_options: bool = False) -> None:
        if not has_options:
            know_only_help(question)
        self.name = Path(sys.argv[0]).stem.removeprefix("bench_")
        self.rows: list[dict[str, Any]] = []
        self.question = question.strip().splitlines()[0]
        self.machine = machine()
        print(self.question)
        print(", ".join(f"{key} {value}" for key, value in self.machine.items()))

    def add(self, what: str, figures: dict[str, float], unit: str, **more: Any) -> None:
        """Add one row; `more` goes into the file (a peer's figure, a target)."""
        row = {"what": what, "unit": unit, **figures, "yardstick_ms": round(yardstick_ms(), 2), **more}
        self.rows.append(row)
        extra = "".join(f", {key} {value}" for key, value in more.items())
        print(
            f"  {what}: {figures['median']:.4g} {unit} ({figures['min']:.4g} to {figures['max']:.4g})"
            f", yardstick {row['yardstick_ms']} ms{extra}"
        )

    def write(self) -> None:
        """Write benchmarks/results/<name>.json."""
        RESULTS.mkdir(exist_ok=True)
        content = {"question": self.question, "machine": self.machine, "rows": self.rows}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
