"""Where the real traces are, if they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

TRACES = Path(__file__).parents[3] / "shared" / "traces"


@pytest.fixture
def real_trace():
    """Path of a shared trace; skips the test where the traces are absent."""

    def find(name: str) -> Path:
        path = TRACES / name
        if not path.exists():
            pytest.skip(f"the shared traces are not there: no {name} beside the checkout")
        return path

    return find
