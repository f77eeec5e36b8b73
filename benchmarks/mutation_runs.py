"""How tests run against a mutant: in a fork of a warm process, those that enter its function, the quickest first.

Starting Python and importing numpy, Hypothesis and pytest costs more than most tests need to notice a bug, so one process
does it once and forks for each mutant. A child puts the changed module in place before anything of ours is imported, as if
its file had been changed; files are left alone, so several children can share one copy of the project.

Limits are CPU time, test by test: other work on the machine slows a test down, but cannot make it a killer.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType

import hypothesis.stateful
import numpy as np
import pytest
from mutants import Mutant, planted

__all__ = ["Baseline", "Verdict", "measure_baseline", "run_mutants"]

WARM = (hypothesis.stateful, np, pytest)  # Imported before the first fork, for all children.
OPTIONS = ("-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-o", "timeout=0", "-m", "not slow")
# A test that takes ten times as long as without the mutant, and three seconds more, will not end.
SLACK_FACTOR, SLACK_S = 10, 3
MAX_MEMORY_BYTES = 4 * 2**30
PASSED, NOTICED, CANNOT_START = 0, 1, 2  # What pytest returns.
TIME_RAN_OUT = "time ran out"
# Tracing a long test would cost minutes; after so many calls it is taken to enter everything.
MAX_TRACED_CALLS = 500_000
EVERYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant: who noticed it (None: nobody), and the CPU time that this took."""

    mutant: Mutant
    killer: str | None
    cpu_s: float

    @property
    def ran_out_of_time(self) -> bool:
        return self.killer == TIME_RAN_OUT


@dataclass(slots=True)
class Baseline:
    """What the tests do without a mutant: CPU time of each, and the functions that each enters.

    A function is "path:first line"; `EVERYWHERE` stands for all of them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    entered: dict[str, list[str]] = field(default_factory=dict)

    def without_those_over(self, longest_s: float) -> Baseline:
        """Only the tests that take at most so much CPU time."""
        kept = {test: seconds for test, seconds in self.seconds.items() if seconds <= longest_s}
        return Baseline(kept, {test: self.entered[test] for test in kept})

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Tests that can notice a mutant, the quickest first; all of them for what runs on import."""
        if mutant.function is None:
            tests = list(self.seconds)
        else:
            place = f"{mutant.path}:{mutant.function}"
            tests = [test for test, entered in self.entered.items() if place in entered or EVERYWHERE in entered]
        return sorted(tests, key=lambda test: (self.seconds[test], test))


class Recorder:
    """A pytest plugin that notes each test's CPU time and the functions of some files that it enters."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self.baseline = Baseline()
        self.failed: list[str] = []
        self._prefix = f"{folder}{os.sep}"
        self._paths = frozenset(paths)
        self._places: dict[CodeType, str | None] = {}
        self._entered: set[str] = set()
        self._num_calls = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._entered, self._num_calls = set(), 0
        started = time.process_time()
        sys.settrace(self._on_call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.baseline.seconds[item.nodeid] = time.process_time() - started
            self.baseline.entered[item.nodeid] = sorted(self._entered)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def _on_call(self, frame: FrameType, event: str, arg: object) -> None:  # noqa: ARG002 - the tracer's signature
        self._num_calls += 1
        if self._num_calls > MAX_TRACED_CALLS:
            sys.settrace(None)
            self._entered.add(EVERYWHERE)
            return
        code = frame.f_code
        try:
            place = self._places[code]
        except KeyError:
            path = code.co_filename.removeprefix(self._prefix)
            place = self._places[code] = f"{path}:{code.co_firstlineno}" if path in self._paths else None
        if place is not None:
            self._entered.add(place)


class Hunter:
    """A pytest plugin that runs the given tests only, in their order, each within its CPU time; notes the first that fails."""

    def __init__(self, tests: Sequence[str], baseline: Baseline) -> None:
        self.killer = ""
        self._places = {test: place for place, test in enumerate(tests)}
        self._seconds = baseline.seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._places), key=lambda i: self._places[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        limit_s = time.process_time() + SLACK_S + SLACK_FACTOR * self._seconds[nodeid]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), resource.RLIM_INFINITY))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid


class PlantedLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a tree instead of from its file."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the loader's signature
        code: CodeType = compile(self._tree, self.path, "exec", dont_inherit=True)
        return code


class PlantedFinder:
    """Finds one module, and has it loaded from a tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, str(path), tree

    def find_spec(
        self,
        fullname: str,
        path: object = None,  # noqa: ARG002 - the finder's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=PlantedLoader(fullname, self.path, self.tree)
        )


def measure_baseline(folder: Path, paths: Sequence[str], tests: Sequence[str]) -> Baseline:
    """Run the tests of a copy without a mutant; SystemExit if one fails. What each costs includes the tracing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _enter(folder)
        recorder = Recorder(folder, paths)
        code = pytest.main([*OPTIONS, *tests], plugins=[recorder])
        found = {"code": int(code), "failed": recorder.failed, "seconds": recorder.baseline.seconds}
        _leave(write, json.dumps({**found, "entered": recorder.baseline.entered}))
    os.close(write)
    with os.fdopen(read) as pipe:
        found = json.loads(pipe.read() or "{}")
    os.waitpid(child, 0)
    if found.get("code") != PASSED:
        raise SystemExit(f"tests fail without any mutant: {found.get('failed', 'they could not be run')}")
    return Baseline(found["seconds"], found["entered"])


def run_mutants(folder: Path, mutants: Sequence[Mutant], baseline: Baseline, jobs: int) -> Generator[Verdict]:
    """Run the tests of each mutant, `jobs` at a time; verdicts come as they are reached."""
    running: dict[int, tuple[Mutant, int]] = {}
    waiting = list(reversed(mutants))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            if tests := baseline.tests_of(mutant):
                child, pipe = _start(folder, mutant, tests, baseline)
                running[child] = (mutant, pipe)
            else:
                yield Verdict(mutant, None, 0.0)
        if running:
            child, status, used = os.wait4(-1, 0)
            mutant, pipe = running.pop(child)
            with os.fdopen(pipe) as file:
                said = file.read()
            yield Verdict(mutant, _killer(status, said), used.ru_utime + used.ru_stime)


def _start(folder: Path, mutant: Mutant, tests: Sequence[str], baseline: Baseline) -> tuple[int, int]:
    """Fork a child that hunts the mutant; returns its id and the pipe that tells what it found."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    _enter(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hunter = Hunter(tests, baseline)
    name = mutant.path.removesuffix(".py").replace("/", ".")
    tree = planted((folder / mutant.path).read_text(), mutant)
    # Importing is told before pytest starts, whose own import hook would otherwise come first.
    sys.meta_path.insert(0, PlantedFinder(name, folder / mutant.path, tree))
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever a mutant causes
        _leave(write, f"{NOTICED} cannot be imported: {type(error).__name__}")
    files = dict.fromkeys(test.split("::")[0] for test in tests)
    code = int(pytest.main([*OPTIONS, *files], plugins=[hunter]))
    _leave(write, f"{code} {hunter.killer}")
    raise AssertionError("a child does not return")


def _enter(folder: Path) -> None:
    """Make this process one of a copy of the project, and quiet."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def _leave(pipe: int, said: str) -> None:
    """Tell the parent, and end at once: nothing that a mutant left behind may run any more."""
    with os.fdopen(pipe, "w") as file:
        file.write(said)
    os._exit(0)


def _killer(status: int, said: str) -> str | None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return TIME_RAN_OUT if number == signal.SIGXCPU else f"ended by signal {number}"
    code, _, killer = said.partition(" ")
    if code not in (str(PASSED), str(NOTICED), str(CANNOT_START)):
        raise RuntimeError(f"pytest ended with {code or 'nothing'} {killer}")
    return None if code == str(PASSED) else killer or "tests cannot be collected"
