"""What security tests share: other interpreters, and the scripts that run in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NEEDED = "import sys, numpy, sortedcontainers; print('%d.%d' % sys.version_info[:2])"

# Tests are imported without a package around them; tenants is found beside this file.
sys.path.append(str(FOLDER))


@cache
def other_pythons() -> dict[str, str]:
    """Version -> an interpreter of it that has what the core needs: from PAGEDKV_PYTHONS, a list as PATH is, or PATH."""
    found = {}
    names = os.environ.get("PAGEDKV_PYTHONS", "").split(os.pathsep)
    names += [f"python3.{minor}" for minor in range(11, 15)]
    for executable in filter(None, map(shutil.which, filter(None, names))):
        ran = subprocess.run([executable, "-c", NEEDED], capture_output=True, text=True, check=False)
        if ran.returncode == 0:
            found.setdefault(ran.stdout.strip(), executable)
    return found


RunScript = Callable[..., str]


@pytest.fixture
def run_script() -> RunScript:
    """Run a script of this folder in a process of its own and return what it prints.

    version: of the Python to run it; that of this process, unless given. Skips where there is none.
    """

    def run(name: str, *options: str, version: str | None = None, hash_seed: str = "0") -> str:
        executable = sys.executable
        if version is not None and version != f"{sys.version_info[0]}.{sys.version_info[1]}":
            if version not in other_pythons():
                pytest.skip(f"no Python {version} with numpy and sortedcontainers on PATH or in PAGEDKV_PYTHONS")
            executable = other_pythons()[version]
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            [executable, *options, str(FOLDER / name)], env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run
