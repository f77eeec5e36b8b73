"""F17: whatever finds a failure prints one command that repeats it. Each finder is given a bug, and its command is run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pagedkv.testing.soak import SoakConfig, SoakFailedError, build_scheduler, run_soak

ROOT = Path(__file__).resolve().parents[2]
AGAIN = re.compile(r"again with[^a-z]*((?:python|pagedkv) .*)")


def run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def command_of(output: str) -> list[str]:
    """The one command that a failure tells, ready to be run by this Python."""
    told = sorted(set(AGAIN.findall(output)))
    assert len(told) == 1, output[-3000:]
    words = shlex.split(told[0])
    start = {"pagedkv": [sys.executable, "-m", "pagedkv"], "python": [sys.executable]}[words[0]]
    return [*start, *words[1:]]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Tests: what each bug is, and which tests must find it


PLANTED = {
    "the abort matrix": (
        "tests/testing/test_scheduler_abort_matrix.py",
        (
            "from pagedkv.scheduler import Scheduler\n"
            "original = Scheduler.abort\n"
            "def abort(self, request_id, now):\n"
            "    for sample in self._live.get(request_id, []):\n"
            "        if sample.row >= 0 and sample.row not in self._memory.host_blocks:\n"
            "            self._memory.pool.acquire(self._memory.sequences.blocks(sample.row)[:1])\n"
            "    original(self, request_id, now)\n"
            "Scheduler.abort = abort\n"
        ),
    ),
    "the fault sweep": (
        "tests/testing/test_scheduler_fault_sweep.py",
        (
            "from pagedkv.sequences import SequenceTable\n"
            "SequenceTable.reserve_width = lambda self, width: setattr(self, 'is_spoilt', True)\n"
        ),
    ),
    "the sweep of event logs": (
        "tests/testing/test_event_log.py",
        (
            "from pagedkv.testing.event_log import EventLogChecker\n"
            "EventLogChecker._require = lambda self, invariant, holds, record, what: None\n"
        ),
    ),
    "scheduler scenarios": (
        "tests/testing/test_scheduler_tests.py",
        (
            "from pagedkv.scheduler.admission import Admission\n"
            "Admission._fits = lambda self, num_blocks: num_blocks + 9 <= self._memory.pool.num_available\n"
        ),
    ),
    "a state machine": (
        "tests/pagedkv/eviction/test_policy_machine.py",
        (
            "from pagedkv.eviction.lru import LRU\n"
            "original = LRU.evict\n"
            "def evict(self, num_blocks):\n"
            "    return original(self, num_blocks)[::-1]\n"
            "LRU.evict = evict\n"
        ),
    ),
    "the state machine of the manager": (
        "tests/testing/test_allocator_suites.py",
        ("from pagedkv.shared_tails import SharedTails\nSharedTails.rows_to_copy = lambda self, rows, starts: []\n"),
    ),
    "seeded attention batches": (
        "tests/attention/test_backends_agree.py",
        (
            "from pagedkv.attention.torch_calls.backend import TorchBackend\n"
            "original = TorchBackend.attend\n"
            "def attend(self, call):\n"
            "    original(self, call)\n"
            "    call.out += 1\n"
            "TorchBackend.attend = attend\n"
        ),
    ),
}


# All go through the same hook; one of them shows that it is there.
QUICK = {"the abort matrix"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PLANTED]
)
def test_a_test_that_fails_tells_its_command(name: str, tmp_path: Path) -> None:
    path, bug = PLANTED[name]
    (tmp_path / "planted_bug.py").write_text(bug)
    pytest_run = [sys.executable, "-m", "pytest", "-p", "planted_bug", "-p", "no:cacheprovider", "-x", "-m", "not slow"]

    failed = run_planted(tmp_path, *pytest_run, path)
    command = command_of(failed.stdout)
    again = run_planted(tmp_path, *command, "-p", "planted_bug", "-p", "no:cacheprovider")

    assert failed.returncode == again.returncode == 1
    assert command_of(again.stdout) == command


def run_planted(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


SUITE = """
from pagedkv.testing import AllocatorTests
from pagedkv.testing.zoo.sharing import CopiesBeyondTwoHolders

class TestMine(AllocatorTests):
    def make_allocator(self, num_blocks, block_size, num_host_blocks):
        return CopiesBeyondTwoHolders(num_blocks, block_size, num_host_blocks)
"""


def test_a_users_suite_tells_the_command_with_its_seed(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugin = ["-p", "pagedkv.testing.pytest_plugin", "-p", "no:cacheprovider"]

    failed = run(sys.executable, "-m", "pytest", *plugin, "-x", "--kv-seed", "5", "test_mine.py", folder=tmp_path)
    again = run(*command_of(failed.stdout), *plugin, folder=tmp_path)

    assert failed.returncode == again.returncode == 1
    assert command_of(failed.stdout)[-4:] == ["--kv-profile", "quick", "--kv-seed", "5"]
    assert command_of(again.stdout) == command_of(failed.stdout)


# Commands


def test_verify_tells_its_command_and_a_script() -> None:
    factory = "pagedkv.testing.zoo.sharing:CopiesBeyondTwoHolders"

    failed = run(sys.executable, "-m", "pagedkv", "verify", factory, "--ops", "1e5", "--seed", "3")
    again = run(*command_of(failed.stdout))

    assert failed.returncode == again.returncode == 1
    assert again.stdout == failed.stdout


def test_a_soak_run_tells_the_shortest_run_that_fails_alike() -> None:
    def forgetful(service: object, sink: object) -> object:
        scheduler = build_scheduler(service, sink)
        release = scheduler._leave

        def leave(sample: object) -> None:
            if scheduler._step > 1500:
                scheduler._memory.pool.acquire(scheduler._memory.sequences.blocks(sample.row)[:1])
            release(sample)

        scheduler._leave = leave
        return scheduler

    with pytest.raises(SoakFailedError) as failed:
        run_soak(SoakConfig(24, 7, service_hours=0.2), factory=forgetful)
    words = failed.value.command.split()
    options = dict(zip(words[2::2], map(float, words[3::2]), strict=True))
    with pytest.raises(SoakFailedError) as again:
        run_soak(SoakConfig(options["--hours"], int(options["--seed"]), options["--service-hours"]), factory=forgetful)

    assert words[:2] == ["pagedkv", "soak"]
    assert options["--hours"] < 1
    assert str(again.value) == str(failed.value)


def test_a_fuzzing_run_tells_a_shrunk_input_that_can_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "fuzz"), *sys.path])
    fuzzing = load("tests/fuzz/run.py")

    def try_input(target: object, data: bytes) -> bool:
        if data.startswith(b"bad") and b"7" in data:
            raise ZeroDivisionError("planted")
        return False

    monkeypatch.setattr(fuzzing, "try_input", try_input)
    monkeypatch.setattr(fuzzing, "mutants", lambda seeds, random: iter([b"bad: 123, 4567, 89"]))
    fuzzing.fuzz("config", 10, 1, tmp_path)
    finding = json.loads(capsys.readouterr().out.splitlines()[0])
    words = shlex.split(finding["again with"])

    assert words[:5] == ["python", "tests/fuzz/run.py", "--target", "config", "--input"]
    assert finding["bytes"] == "4 of 18"
    assert fuzzing.repeat("config", words[5]) == 1
    assert fuzzing.repeat("config", f"@{next(tmp_path.iterdir())}") == 1
    assert fuzzing.repeat("config", "YWJj") == 0


def test_a_surviving_mutant_is_told_with_the_command_that_plants_it_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    mutation = load("benchmarks/mutation.py")
    path = "pagedkv/scheduler/waiting_queue.py"
    mutants = mutation.mutants_of(path, (ROOT / path).read_text())

    survived = mutation.Verdict(mutants[3], killer=None, cpu_s=0.0)
    mutation.report([survived], len(mutants), argparse.Namespace(seed=1, json=None), 0.0)
    survivor = json.loads(capsys.readouterr().out)["survivors"][0]

    listed = run(*[sys.executable, *shlex.split(survivor["again with"])[1:]], "--list")
    assert listed.stdout.splitlines() == [survivor["mutant"]]
