"""The pytest plugin: a profile, a seed, and markers. It imports nothing beyond what pytest has imported already."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MARKERS = {
    "kv_allocator": "a test inherited from pagedkv.testing.AllocatorTests",
    "kv_scheduler": "a test inherited from pagedkv.testing.SchedulerTests",
}
BASES = {"kv_allocator": "AllocatorTests", "kv_scheduler": "SchedulerTests"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kv-profile` and `--kv-seed`."""
    group = parser.getgroup("pagedkv")
    group.addoption(
        "--kv-profile", choices=("quick", "ci", "soak"), default="quick", help="how much the inherited tests try"
    )
    group.addoption("--kv-seed", type=int, default=0, help="seed of the inherited tests' random calls")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_report_header(config: pytest.Config) -> str:
    """What a failure needs in order to be repeated."""
    return f"pagedkv: profile {config.getoption('--kv-profile')}, seed {config.getoption('--kv-seed')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark inherited tests. Their base class is found by name among what the tests have imported themselves."""
    if "pagedkv.testing" not in sys.modules:
        return
    for item in items:
        bases = getattr(getattr(item, "cls", None), "__mro__", ())
        for marker, base_name in BASES.items():
            if any(base.__name__ == base_name and base.__module__.startswith("pagedkv.testing.") for base in bases):
                item.add_marker(marker)
