"""`pagedkv verify`: exit codes, messages, and scripts that repeat what they tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_here

from pagedkv.testing import ReferenceAllocator, verify
from pagedkv.testing.zoo.blocks import TakesARandomBlock
from pagedkv.testing.zoo.sharing import CopiesBeyondTwoHolders

MANAGER = "pagedkv.testing.manager_allocator:make_allocator"
TINY = "num_blocks=2, block_size=2, num_host_blocks=2"
BAD = "pagedkv.testing.zoo.sharing:CopiesBeyondTwoHolders"


def run(*arguments: object, cwd: Path, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pagedkv", "verify", *map(str, arguments)]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_an_allocator_that_breaks_nothing_ends_with_0(tmp_path: Path) -> None:
    result = run(MANAGER, "--ops", "2e3", "--seed", 7, cwd=tmp_path)
    as_json = run(MANAGER, "--ops", "2e3", "--seed", 7, "--json", cwd=tmp_path)

    outcome = json.loads(as_json.stdout)
    assert (result.returncode, result.stderr, as_json.returncode) == (0, "", 0)
    assert "trials, nothing broken (seed 7, " in result.stdout
    assert (outcome["passed"], outcome["seed"], outcome["failure"]) == (True, 7, None)
    assert outcome["num_operations"] >= 2000


def test_a_broken_one_ends_with_1_and_a_script_that_breaks_in_the_same_way(tmp_path: Path) -> None:
    result, as_json = run(BAD, cwd=tmp_path), run(BAD, "--json", cwd=tmp_path)

    failure = json.loads(as_json.stdout)["failure"]
    assert result.returncode == as_json.returncode == 1
    assert result.stdout.endswith(f"again with: {failure['command']}\n")
    assert result.stdout.startswith("I5 is broken: append(")
    assert failure["script"] in result.stdout
    assert failure["invariant"] == "I5"
    assert len(failure["calls"]) <= 5
    (tmp_path / "repeat.py").write_text(failure["script"])
    repeated = subprocess.run([sys.executable, "repeat.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert repeated.returncode == 1
    assert repeated.stderr.splitlines()[-1] == f"pagedkv.errors.InvariantViolation: I5: {failure['message']}"


def test_an_allocator_of_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_engine").mkdir()
    (tmp_path / "my_engine" / "memory.py").write_text(
        "from pagedkv.testing import ReferenceAllocator\n"
        "def make_allocator(num_blocks, block_size, num_host_blocks):\n"
        "    return ReferenceAllocator(num_blocks, block_size, num_host_blocks)\n"
    )

    result = run("my_engine.memory:make_allocator", "--ops", 500, cwd=tmp_path)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["no_colon"],
            "the factory is named module:function, such as my_engine.memory:make_allocator; found 'no_colon'",
        ),
        (["not_there:f"], "cannot import not_there: ModuleNotFoundError: No module named 'not_there'"),
        (["broken:f"], "cannot import broken: ZeroDivisionError: division by zero"),
        (["leaves:f"], "cannot import leaves: SystemExit: 3"),
        (["pagedkv:nothing"], "pagedkv has no nothing"),
        (["pagedkv:__version__"], "pagedkv:__version__ is not callable: expected a factory, found str"),
        (
            ["json:dumps"],
            f"json:dumps({TINY}) raised TypeError: dumps() takes 1 positional argument but 3 were given",
        ),
        (["pagedkv:CacheConfig"], "CacheConfig.capabilities must be a Capabilities, found None"),
        ([MANAGER, "--ops", "many"], "--ops must be a whole number from 1 to 1e12, found 'many'"),
        ([MANAGER, "--ops", "1.5"], "--ops must be a whole number from 1 to 1e12, found '1.5'"),
    ],
)
def test_what_cannot_be_run_ends_with_2_and_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")

    imports_from_there = arguments[0] in ("broken:f", "leaves:f")
    result = run(*arguments, cwd=tmp_path) if imports_from_there else run_here("verify", *arguments, cwd=tmp_path)

    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


def test_results_are_the_same_whatever_the_hash_seed(tmp_path: Path) -> None:
    digests = set()
    for hash_seed in ("0", "1", "random"):
        result = run(MANAGER, "--ops", 2000, "--json", cwd=tmp_path, hash_seed=hash_seed)
        digests.add(json.loads(result.stdout)["digest"])

    assert len(digests) == 1


def test_equal_seeds_give_equal_reports_and_other_seeds_other_calls() -> None:
    first, second, other = (verify(ReferenceAllocator, num_operations=2000, seed=seed) for seed in (1, 1, 2))

    assert first == second
    assert first.digest != other.digest


def test_fewer_checks_make_the_same_calls() -> None:
    full = verify(ReferenceAllocator, num_operations=3000)
    cheap = verify(ReferenceAllocator, num_operations=3000, check_every=100, read_every=1000)

    assert (full.digest, full.failure) == (cheap.digest, None)


def test_the_script_of_a_failure_that_does_not_repeat_compares_two_runs() -> None:
    failure = verify(TakesARandomBlock).failure

    assert failure is not None
    assert failure.invariant == "I14"
    assert failure.script("m:f").splitlines()[-1] == "trial.compare(again)"


def test_a_failure_that_does_not_come_again_is_told_as_such() -> None:
    made: list[ReferenceAllocator] = []

    class FailsOnce(ReferenceAllocator):
        def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
            super().__init__(num_blocks, block_size, num_host_blocks)
            made.append(self)

        def num_free(self) -> int:
            return super().num_free() + (len(made) == 1 and len(self.sequences) > 2)

    failure = verify(FailsOnce).failure

    assert failure is not None
    assert not failure.is_repeated
    assert len(failure.operations) == failure.num_operations_found
    assert "\n# Made again, these calls did not break it: " in failure.script("m:f")


def test_a_failure_is_shrunk_to_a_few_calls() -> None:
    failure = verify(CopiesBeyondTwoHolders).failure

    assert failure is not None
    assert len(failure.operations) <= 5 < failure.num_operations_found
