"""What tests of every part share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Triton asks once, on import, whether kernels are to be interpreted, and transformers imports it. A machine with a GPU sets
# this to 0 to compile them.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"

# The same examples in every run, however busy the machine.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared_trace() -> Callable[[str], Path]:
    """Find a public trace by name, or skip."""

    def find(name: str) -> Path:
        path = SHARED_TRACES / name
        if not path.exists():
            pytest.skip(f"the public trace {name} is not beside this checkout")
        return path

    return find
