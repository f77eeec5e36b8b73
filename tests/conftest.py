"""What tests of every part share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

from pagedkv.testing.pytest_plugin import tell_repeat_command

# Triton asks once, on import, whether kernels are to be interpreted, and transformers imports it. A machine with a GPU sets
# this to 0 to compile them.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests are imported without a package around them; command_line is found beside this file.
sys.path.append(str(Path(__file__).parent))

# docs/traces.md says where to get the public traces.
PUBLIC_TRACES = Path(os.environ.get("PAGEDKV_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")

# The same examples in every run, however busy the machine.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared_trace() -> Callable[[str], Path]:
    """Find a public trace by name, or skip."""

    def find(name: str) -> Path:
        path = PUBLIC_TRACES / name
        if not path.exists():
            pytest.skip(
                f"needs the public trace {name}: PAGEDKV_TRACES names its folder, docs/traces.md says where to get it"
            )
        return path

    return find


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Examples are the same in every run, so the name of a test is all that it takes to repeat its failure (F17)."""
    report = yield
    tell_repeat_command(item, report)
    return report
