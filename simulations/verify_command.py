"""`pagedkv verify`: property tests against an allocator of the user's, without pytest."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pagedkv import ConfigError
from pagedkv.simulations.progress import progress_bar
from pagedkv.testing.allocator_protocol import MakeAllocator
from pagedkv.testing.allocator_verification import Failure, Report, called
from pagedkv.testing.allocator_verification import verify as run_verification

__all__ = ["load_factory", "verify"]

MAX_OPERATIONS = 10**12


def verify(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="Called as FACTORY(num_blocks, block_size, num_host_blocks); returns an AllocatorProtocol.",
            show_default=False,
        ),
    ],
    ops: Annotated[str, typer.Option(help="Random calls to make, such as 100000 or 1e6.")] = "1e5",
    seed: Annotated[int, typer.Option(help="Same seed, same calls.")] = 0,
    check_every: Annotated[int, typer.Option(help="Recount all tables after so many calls.", min=1)] = 1,
    read_every: Annotated[int, typer.Option(help="Read all content back after so many calls.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Make random calls on an allocator and compare every result with a model.

    Exit code 0: nothing was broken. 1: an invariant was; its id and a shrunk script that repeats it are printed. 2: the
    allocator could not be run at all.
    """
    num_operations = _as_count(ops)
    make_allocator = load_factory(factory)
    start = time.perf_counter()
    with progress_bar("verifying", num_operations) as progress:
        report = run_verification(
            make_allocator,
            num_operations=num_operations,
            seed=seed,
            check_every=check_every,
            read_every=read_every,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    # A run that ends with the trial that fails; how often is checked decides what is found.
    every = f" --check-every {check_every}" * (check_every > 1) + f" --read-every {read_every}" * (read_every > 1)
    command = f"pagedkv verify {factory} --ops {report.num_operations} --seed {seed}{every}"
    if as_json:
        typer.echo(json.dumps(_as_json(factory, report, seconds, command), indent=2))
    elif report.failure is None:
        rate = report.num_operations / seconds
        typer.echo(
            f"{factory}: {report.num_operations:,} operations in {report.num_trials:,} trials, nothing broken "
            f"(seed {seed}, {seconds:.1f} s, {rate:,.0f} operations/s, digest {report.digest[:16]})"
        )
    else:
        _print_failure(factory, report, report.failure)
        typer.echo(f"again with: {command}")
    if report.failure is not None:
        raise typer.Exit(1)


def load_factory(name: str) -> MakeAllocator:
    """Import `module:function`, looking in the current folder first. Raises ConfigError, one line, for whatever is wrong."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(
            f"the factory is named module:function, such as my_engine.memory:make_allocator; found {name!r}"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # Importing runs the user's code, which may raise anything.
        raise ConfigError(f"cannot import {module_name}: {_one_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name} is not callable: expected a factory, found {type(found).__name__}")
    factory: MakeAllocator = found
    try:
        factory(2, 2, 2)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{name}(num_blocks=2, block_size=2, num_host_blocks=2) raised {_one_line(error)}") from error
    return factory


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _as_count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 1 <= number <= MAX_OPERATIONS or number != int(number):
        raise ConfigError(f"--ops must be a whole number from 1 to 1e12, found {text!r}")
    return int(number)


def _print_failure(factory: str, report: Report, failure: Failure) -> None:
    typer.echo(f"{failure.invariant} is broken: {failure.message}")
    told = f"found after {report.num_operations:,} operations (seed {report.seed}, trial {failure.trial_idx})"
    if failure.is_repeated:
        num_found, num_left = failure.num_operations_found, len(failure.operations)
        typer.echo(f"{told}, shrunk from {num_found} calls to {num_left}; this script repeats it:\n")
    else:
        typer.echo(f"{told}; this script makes the same {len(failure.operations)} calls:\n")
    typer.echo(failure.script(factory))


def _as_json(factory: str, report: Report, seconds: float, command: str) -> dict[str, Any]:
    failure = report.failure
    found = None
    if failure is not None:
        found = {
            "invariant": failure.invariant,
            "message": failure.message,
            "trial": failure.trial_idx,
            "num_blocks": failure.size[0],
            "block_size": failure.size[1],
            "num_host_blocks": failure.size[2],
            "calls": [called(operation) for operation in failure.operations],
            "num_calls_before_shrinking": failure.num_operations_found,
            "is_repeated": failure.is_repeated,
            "script": failure.script(factory),
            "command": command,
        }
    return {
        "factory": factory,
        "passed": failure is None,
        "seed": report.seed,
        "num_operations": report.num_operations,
        "num_trials": report.num_trials,
        "digest": report.digest,
        "wall_s": seconds,
        "operations_per_s": report.num_operations / seconds,
        "failure": found,
    }
