"""The Triton kernels compile for Hopper, where there is no GPU too, and fit its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("hopper_kernels.py")
# What a program may have of a multiprocessor: 227 KiB (CUDA programming guide, compute capability 9.0).
MAX_SHARED = 227 * 1024


def compiled(names: str, folder: Path) -> list[dict[str, object]]:
    """Rows of `hopper_kernels.py`. In a process of its own, for this one interprets kernels."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    run = subprocess.run([sys.executable, PROGRAM, names], env=environment, capture_output=True, text=True, check=False)
    if "ptxas" in run.stderr and "not found" in run.stderr.lower():
        pytest.skip("this Triton has no assembler for NVIDIA GPUs")
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_rows(rows: list[dict[str, object]]) -> None:
    assert rows
    for row in rows:
        assert row["shared"] <= MAX_SHARED, row  # type: ignore[operator]
        assert row["stack"] <= row["allowed_stack"], row  # type: ignore[operator]


def test_decode_copies_asynchronously_to_tensor_cores(tmp_path: Path) -> None:
    rows = compiled("decode bfloat16 128", tmp_path)

    check_rows(rows)
    attend = next(row for row in rows if row["kernel"] == "attend_tasks")
    assert attend["LDGSTS"] > 0  # type: ignore[operator]
    assert attend["HMMA"] > 0  # type: ignore[operator]
    # Two programs share a multiprocessor.
    assert attend["shared"] <= MAX_SHARED // 2  # type: ignore[operator]
    assert attend["registers"] * 128 <= 65536 // 2  # type: ignore[operator]


def test_prefill_multiplies_by_warpgroups(tmp_path: Path) -> None:
    rows = compiled("prefill bfloat16 128", tmp_path)

    check_rows(rows)
    assert next(row for row in rows if row["kernel"] == "attend_tasks")["HGMMA"] > 0  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_fits_a_hopper_multiprocessor(tmp_path: Path) -> None:
    check_rows(compiled("", tmp_path))
