"""What is fuzzed: each target takes any bytes and returns, or raises one of the library's typed errors."""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_seeds
import numpy as np

from pagedkv import CacheConfig, CacheIdentity, ExtraKey, InvariantViolation, KVSpec, PagedKVError, SimulatedPrompt
from pagedkv.scheduler import Cheaper, Priority, Request, SchedulerConfig, replay_recording
from pagedkv.simulations.run_records import read_run
from pagedkv.simulations.traces import load_trace
from pagedkv.simulations.traces.checks import find_problem

__all__ = ["TARGETS", "Target", "try_input"]

MAX_MESSAGE_CHARS = 2000
CONFIGURED = {
    kind.__name__: kind
    for kind in (
        CacheConfig,
        CacheIdentity,
        ExtraKey,
        KVSpec,
        SimulatedPrompt,
        Request,
        SchedulerConfig,
        Priority,
        Cheaper,
    )
}


@cache
def scratch() -> Path:
    """A folder of this process, in memory where there is such a thing."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=shared_memory if shared_memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def read_as_trace(data: bytes) -> None:
    path = scratch() / "trace"
    path.write_bytes(data)
    trace = load_trace(path)
    if find_problem(trace) is not None:
        raise AssertionError("a trace was loaded that breaks its promises")
    if len(trace.run_counts) == 0 or int(trace.run_counts.sum()) < 10**6:
        trace.describe()


def read_as_recording(data: bytes) -> None:
    lines = data.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    for plan in replay_recording(lines, max_blocks=2**16):
        if plan.step > 1000:
            break


def read_as_run(data: bytes) -> None:
    folder = scratch() / "run"
    folder.mkdir(exist_ok=True)
    names = ("run.json", "steps.csv", "trace.jsonl")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name, part in zip(names, data.split(fuzz_seeds.RUN_PARTS), strict=False):
        (folder / name).write_bytes(part)
    read_run(folder)


@cache
def storage() -> Any:
    from pagedkv.storage import KVStorage

    return KVStorage(fuzz_seeds.SAVED_SPEC, 2)


def read_as_saved_blocks(data: bytes) -> None:
    from pagedkv.storage import read_saved

    path = scratch() / "saved"
    path.write_bytes(data)
    before = storage().read_blocks(np.arange(2))
    try:
        read_saved(path, fuzz_seeds.SAVED_SPEC)
        storage().load_blocks(path, np.arange(2))
    except PagedKVError:
        if not np.array_equal(before, storage().read_blocks(np.arange(2))):
            raise AssertionError("a file was refused after blocks were changed") from None
        raise


def read_as_configs(data: bytes) -> None:
    """A JSON object: names of classes with their arguments. One that is missing or unknown is Python's own TypeError."""
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        described = None
    num_made = 0
    for name, fields in described.items() if isinstance(described, dict) else ():
        kind = CONFIGURED.get(name)
        if kind is None or not isinstance(fields, dict):
            continue
        known = {field.name: fields[field.name] for field in dataclasses.fields(kind) if field.name in fields}
        needed = {field.name for field in dataclasses.fields(kind) if field.default is field.default_factory}
        if not needed <= known.keys():
            continue
        for key in ("salt", "digest"):  # JSON has no bytes.
            if isinstance(known.get(key), str):
                known[key] = known[key].encode("utf-8", "surrogatepass")
        made = kind(**known)
        num_made += 1
        if isinstance(made, SimulatedPrompt) and made.num_tokens < 10**6:
            made.block_keys(4)
    if not num_made:
        raise PagedKVError("nothing is described")


@dataclass(frozen=True)
class Target:
    """A parser, what fuzzing starts from, and pieces that are worth putting in."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


TARGETS = {
    "trace": Target(read_as_trace, lambda: list(fuzz_seeds.TRACES)),
    "recording": Target(read_as_recording, fuzz_seeds.recordings),
    "run": Target(read_as_run, lambda: list(fuzz_seeds.RUNS)),
    "saved": Target(read_as_saved_blocks, fuzz_seeds.saved_blocks),
    "config": Target(read_as_configs, lambda: [json.dumps(config).encode() for config in fuzz_seeds.CONFIGS]),
}


def try_input(target: Target, data: bytes) -> bool:
    """Read the bytes; returns whether they were accepted. Lets through whatever no caller should have to expect."""
    try:
        target.read(data)
    except InvariantViolation:
        raise
    except PagedKVError as error:
        message = str(error)
        if "\n" in message or len(message) > MAX_MESSAGE_CHARS:
            raise AssertionError(f"an error that fills a log: {len(message)} characters") from error
        return False
    return True
