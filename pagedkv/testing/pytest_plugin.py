"""The pytest plugin: a profile, a seed, markers, and the command that repeats a failure.

It imports nothing beyond what pytest has imported already.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

    import pytest

MARKERS = {
    "kv_allocator": "a test inherited from pagedkv.testing.AllocatorTests",
    "kv_scheduler": "a test inherited from pagedkv.testing.SchedulerTests",
}
REPEAT = "again with"
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


def repeat_command(item: pytest.Item) -> str:
    """One command that runs this test again, on the same examples."""
    options = f"--kv-profile {item.config.getoption('--kv-profile')} --kv-seed {item.config.getoption('--kv-seed')}"
    chosen = '-m "slow or not slow" ' if item.get_closest_marker("slow") else ""
    return f"python -m pytest {shlex.quote(item.nodeid)} {chosen}{options}"


def tell_repeat_command(item: pytest.Item, report: pytest.TestReport) -> None:
    """Print the command with the failure, once: it is the last thing that is told of it."""
    if report.failed and REPEAT not in dict(report.sections):
        report.sections.append((REPEAT, repeat_command(item)))


def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure of an inherited test names the command that repeats it."""
    report = yield
    if any(item.get_closest_marker(marker) for marker in BASES):
        tell_repeat_command(item, report)
    return report


# Set by hand, because the decorator would have to be imported from pytest.
pytest_runtest_makereport.pytest_impl = {"wrapper": True}  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark inherited tests. Their base class is found by name among what the tests have imported themselves."""
    if "pagedkv.testing" not in sys.modules:
        return
    for item in items:
        bases = getattr(getattr(item, "cls", None), "__mro__", ())
        for marker, base_name in BASES.items():
            if any(base.__name__ == base_name and base.__module__.startswith("pagedkv.testing.") for base in bases):
                item.add_marker(marker)
