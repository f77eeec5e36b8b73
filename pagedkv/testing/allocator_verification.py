"""Millions of random calls on an allocator, seeded; a failure is shrunk and told as a script that repeats it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from pagedkv.errors import InvariantViolation
from pagedkv.testing.allocator_protocol import MakeAllocator
from pagedkv.testing.allocator_trial import AllocatorTrial
from pagedkv.testing.random_operations import Operation, RandomOperations, TrialSize, large_size, random_size
from pagedkv.testing.shrinking import shrink

__all__ = ["Failure", "Report", "replay", "verify"]

CALLS_PER_TRIAL = 250
LARGE_EVERY, CALLS_PER_LARGE_TRIAL = 40, 40
"""One trial in so many has a large pool, and fewer calls, since each of its recounts takes longer."""
NOT_REPEATED = (
    "Made again, these calls did not break it: the allocator's answers hang on chance, or on what other allocators did."
)
REPEAT_EVERY = 50
"""One trial in so many is run a second time, and both runs must give the same results (I14)."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What was broken, and the shortest list of calls found that breaks it."""

    invariant: str
    message: str
    trial_idx: int
    size: TrialSize
    operations: list[Operation]
    num_operations_found: int
    """How many calls there were before shrinking."""
    is_repeated: bool = True
    """Whether the same calls broke the same invariant on a fresh allocator. If not, they were not shrunk."""

    def script(self, factory: str) -> str:
        """A Python script that repeats the failure. `factory` names the allocator's factory, `module:expression`."""
        module, _, name = factory.partition(":")
        num_blocks, block_size, num_host_blocks = self.size
        lines = [
            f'"""{self.invariant}: {self.message.splitlines()[0]}"""'.replace("\\", "\\\\"),
            "" if self.is_repeated else f"# {NOT_REPEATED}\n",
            f"from {module} import {re.split('[.(]', name)[0]}",
            "from pagedkv.testing import AllocatorTrial",
            "",
            f"trial = AllocatorTrial({name}, {num_blocks=}, {block_size=}, {num_host_blocks=})",
        ]
        if self.invariant == "I14":
            lines += ["again = trial.fresh()"]
            lines += [f"{trial}.{called(operation)}" for operation in self.operations for trial in ("trial", "again")]
            lines += ["trial.compare(again)"]
        else:
            lines += [f"trial.{called(operation)}" for operation in self.operations]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Report:
    """What was run, and what came of it. `digest` is that of every result, the same in every run of the same code."""

    seed: int
    num_operations: int
    num_trials: int
    digest: str
    failure: Failure | None


def verify(
    make_allocator: MakeAllocator,
    *,
    num_operations: int = 100_000,
    seed: int = 0,
    check_every: int = 1,
    read_every: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Run random calls until `num_operations` have been made or something is broken. O(operations).

    Calls come in trials of about 250 on a fresh, tiny allocator, and now and then of 40 on one of 300 to 400 blocks;
    trial i depends on the seed and on i alone. With the defaults, all tables are recounted and all content is read back
    after every call.
    """
    digest = hashlib.sha256()
    num_made = trial_idx = 0
    failure: Failure | None = None
    while num_made < num_operations and failure is None:
        random = Random(f"{seed}/{trial_idx}")  # noqa: S311 - a seed must give the same calls again
        is_large = trial_idx % LARGE_EVERY == LARGE_EVERY // 4
        size = large_size(random) if is_large else random_size(random)
        most = CALLS_PER_LARGE_TRIAL if is_large else CALLS_PER_TRIAL
        trial = AllocatorTrial(make_allocator, *size, check_every=check_every, read_every=read_every)
        error = _run_randomly(trial, random, min(most, num_operations - num_made))
        if error is None and trial_idx % REPEAT_EVERY == 0:
            error = _run_twice(make_allocator, size, trial.calls, check_every=check_every, read_every=read_every)
        num_made += trial.num_calls
        if error is not None:
            failure = _shrunk(make_allocator, size, trial.calls, error, trial_idx)
        digest.update(repr(trial.log).encode())
        trial_idx += 1
        if progress is not None:
            progress(num_made)
    return Report(seed, num_made, trial_idx, digest.hexdigest(), failure)


def replay(
    make_allocator: MakeAllocator, size: TrialSize, operations: Iterable[Operation]
) -> InvariantViolation | None:
    """Carry out the calls on a fresh allocator with every check; return what was broken, if anything was."""
    try:
        trial = AllocatorTrial(make_allocator, *size)
        for operation in operations:
            trial.run(operation)
    except InvariantViolation as error:
        return error
    return None


def _run_randomly(trial: AllocatorTrial, random: Random, num_calls: int) -> InvariantViolation | None:
    """Make so many calls or a few more, and close everything."""
    source = RandomOperations(random, trial.model)
    try:
        while trial.num_calls < num_calls:
            for operation in source.draw():
                trial.run(operation)
        trial.finish()
    except InvariantViolation as error:
        return error
    return None


def _run_twice(
    make_allocator: MakeAllocator,
    size: TrialSize,
    operations: Iterable[Operation],
    *,
    check_every: int = 1,
    read_every: int = 1,
) -> InvariantViolation | None:
    """The same calls on two fresh allocators must give the same results."""
    try:
        trial, again = (
            AllocatorTrial(make_allocator, *size, check_every=check_every, read_every=read_every) for _ in range(2)
        )
        for operation in operations:
            trial.run(operation)
            again.run(operation)
        trial.compare(again)
    except InvariantViolation as error:
        return error
    return None


def _shrunk(
    make_allocator: MakeAllocator,
    size: TrialSize,
    operations: list[Operation],
    error: InvariantViolation,
    trial_idx: int,
) -> Failure:
    """Shrink as long as the same invariant is broken: another one would be another story."""
    run = _run_twice if error.invariant == "I14" else replay
    last = [error]

    def fails(candidate: list[Operation]) -> bool:
        found = run(make_allocator, size, candidate)
        if found is None or found.invariant != error.invariant:
            return False
        last[0] = found
        return True

    is_repeated = fails(operations)
    shortest = shrink(operations, fails) if is_repeated else operations
    message = str(last[0]).removeprefix(f"{error.invariant}: ")
    return Failure(error.invariant, message, trial_idx, size, shortest, len(operations), is_repeated)


def called(operation: Operation) -> str:
    """An operation as one would write the call."""
    return f"{operation[0]}({', '.join(map(repr, operation[1:]))})"
