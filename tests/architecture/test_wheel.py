"""What an installation puts on a user's machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "pagedkv"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}

    assert {name for name in names if not name.endswith(".dist-info")} == {"pagedkv"}


@pytest.mark.parametrize(
    "path",
    [
        "pagedkv/scheduler/scheduler.py",
        "pagedkv/simulations/cli.py",
        "pagedkv/simulations/traces/sample.jsonl.gz",
        "pagedkv/eviction/lru.py",
        "pagedkv/py.typed",
    ],
)
def test_the_wheel_holds(wheel: zipfile.ZipFile, path: str) -> None:
    assert path in wheel.namelist()


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or "").stat().st_size < 800_000
