"""The table that bench_attention.py ends with: each line's worst, median and best case beside what it is held to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

# What each line of the table is held to; "at least" but for times.
TARGETS = {
    "decode bf16, x SDPA": 2.2,
    "decode bf16, share of read bandwidth": 0.55,
    "decode bf16, x vLLM CPU": 2.0,
    "decode fp32, x SDPA": 1.1,
    "prefill bf16, x SDPA": 5.0,
    "prefill bf16, share of matmul": 0.55,
    "mixed, x SDPA loop": 4.0,
    "decode int8, x its own bf16": 1.5,
    "torch backend, decode at 4k, x SDPA": 0.4,
    "scattered blocks, x consecutive": 0.95,
    "plan of 256 ragged sequences, us": 50.0,
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


def show(table: list[dict[str, Any]]) -> None:
    """Print the lines that were measured."""
    print(f"\n{'line':42}{'worst':>9}{'median':>9}{'best':>9}{'target':>9}")
    for row in table:
        if "worst" in row:
            numbers = f"{row['worst']:>9.3g}{row['median']:>9.3g}{row['best']:>9.3g}{row['target'] or '':>9}"
            print(f"{row['line']:42}{numbers}  {row['verdict']} ({row['worst_case']})")
