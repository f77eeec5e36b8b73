"""The pytest plugin is light, and does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUITE = """
from pagedkv.testing import AllocatorTests, ReferenceAllocator
from pagedkv.testing.zoo.sharing import CopiesBeyondTwoHolders

class TestGood(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return ReferenceAllocator(num_blocks, block_size, num_host_blocks)

class TestBad(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return CopiesBeyondTwoHolders(num_blocks, block_size, num_host_blocks)

def test_of_the_users_own():
    pass
"""


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "pagedkv.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_importing_the_plugin_loads_neither_torch_nor_numpy_nor_hypothesis_nor_pytest() -> None:
    code = (
        "import sys, pagedkv.testing.pytest_plugin\n"
        "print(sorted({'torch', 'numpy', 'hypothesis', 'pytest', 'sortedcontainers'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout == "[]\n"


def test_the_header_names_profile_and_seed(tmp_path: Path) -> None:
    result = pytest_run(tmp_path, "--kv-profile", "ci", "--kv-seed", "7", "-k", "own")

    assert "pagedkv: profile ci, seed 7" in result.stdout.splitlines()


def test_inherited_tests_are_marked_and_the_users_own_are_not(tmp_path: Path) -> None:
    result = pytest_run(tmp_path, "-m", "not kv_allocator", "-q")

    assert "1 passed" in result.stdout


def test_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    result = pytest_run(tmp_path, "--kv-profile", "huge")

    assert result.returncode == 4
    assert "invalid choice: 'huge'" in result.stderr


def test_a_failing_suite_names_the_invariant_and_how_to_repeat_it(tmp_path: Path) -> None:
    result = pytest_run(tmp_path, "-k", "TestBad and random_calls")

    assert result.returncode == 1
    assert "I5: append(" in result.stdout
    assert "from test_suite import TestBad\n" in result.stdout
    assert "trial = AllocatorTrial(TestBad().make_allocator, num_blocks=" in result.stdout


def test_what_needs_hypothesis_says_so_when_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import pagedkv.testing\n"
        "pagedkv.testing.verify\n"
        "pagedkv.testing.AllocatorMachine"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert result.stderr.splitlines()[-1] == (
        "ImportError: pagedkv.testing.AllocatorMachine needs hypothesis: in a checkout of pagedkv, pip install '.[testing]'"
    )
