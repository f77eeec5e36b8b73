"""What a run of `benchmarks/gpu_check.py` survives: there is one chance at a GPU, and a kernel may not compile on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from batches import Batch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class CompilationError(Exception):
    """Stands for Triton's: its message has many lines, and it cannot be sent from one process to another."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"at {line}: {reason}\n  the source\n  and a mark below it")


def does_not_compile(*_: object, **__: object) -> None:
    raise CompilationError(7, "no such layout")


@pytest.fixture(autouse=True)
def _with_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def test_a_case_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_correctness

    monkeypatch.setattr(Batch, "call", does_not_compile)
    case = Batch(lens=((1, 3),))

    assert gpu_correctness.wrong(case) == f"{case}: CompilationError: at 7: no such layout"
    assert gpu_correctness.told(does_not_compile) == "does_not_compile: CompilationError: at 7: no such layout"


def test_a_case_that_does_not_warm_up_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_cases
    import gpu_tiles

    from pagedkv.attention.triton_kernels.tiles import Tile

    monkeypatch.setattr(gpu_cases, "Pool", does_not_compile)
    case = gpu_cases.Case("decode", ((1, 1, 32),))

    assert gpu_cases.warm(case) == "CompilationError: at 7: no such layout"
    assert gpu_tiles.warm_tile(case, Tile(16, 32, 4, 3)) == "CompilationError: at 7: no such layout"


def test_a_case_that_was_not_warmed_up_is_a_row_that_says_why() -> None:
    import gpu_cases
    import gpu_check

    case = gpu_cases.Case("decode", ((1, 1, 32),))

    rows = gpu_check.time_section([case], {}, {gpu_check.kind_of(case): "it does not compile"})

    assert rows == [{"what": "decode", "left_out": "it does not compile"}]


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    monkeypatch.setenv("PATH", "")

    assert harness.machine()["commit"] == "unknown"
