"""F13: whatever bytes a parser is given, it returns or raises one typed error of one line, and takes little memory."""

from __future__ import annotations

import resource
import tracemalloc
from random import Random

import pytest
from fuzz_mutations import mutants
from fuzz_targets import TARGETS, Target, try_input

from pagedkv import InvariantViolation, PagedKVError

NUM_QUICK = {"trace": 1200, "recording": 800, "run": 600, "saved": 600, "config": 4000}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(params=TARGETS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "saved":
        pytest.importorskip("safetensors.torch")
    return request.param


def test_what_fuzzing_starts_from_is_accepted(name: str) -> None:
    assert all(try_input(TARGETS[name], data) for data in TARGETS[name].seeds())


def test_mutants_are_accepted_or_refused_by_a_typed_error(name: str) -> None:
    target = TARGETS[name]
    inputs = mutants(target.seeds(), Random(f"quick/{name}"))  # noqa: S311
    tracemalloc.start()
    try:
        num_accepted = sum(try_input(target, next(inputs)) for _ in range(NUM_QUICK[name] // 4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    num_accepted += sum(try_input(target, next(inputs)) for _ in range(NUM_QUICK[name] * 3 // 4))

    assert 0 < num_accepted < NUM_QUICK[name]
    assert peak < 64 * 2**20


@pytest.mark.slow
def test_a_hundred_thousand_mutants_take_less_than_256_mb_more(name: str) -> None:
    target = TARGETS[name]
    inputs = mutants(target.seeds(), Random(f"slow/{name}"))  # noqa: S311
    next(try_input(target, data) for data in inputs)
    before = peak_mb()
    for _ in range(100_000):
        try_input(target, next(inputs))

    assert peak_mb() - before < 256


@pytest.mark.parametrize("raised", [ValueError("x"), InvariantViolation("I1", "x"), MemoryError(), RecursionError()])
def test_any_other_error_is_a_finding(raised: Exception) -> None:
    def read(data: bytes) -> None:
        raise raised

    with pytest.raises(type(raised)):
        try_input(Target(read, list), b"")


@pytest.mark.parametrize("message", ["two\nlines", "x" * 2001])
def test_an_error_that_fills_a_log_is_a_finding(message: str) -> None:
    def read(data: bytes) -> None:
        raise PagedKVError(message)

    with pytest.raises(AssertionError, match="fills a log"):
        try_input(Target(read, list), b"")


def test_the_same_seed_gives_the_same_mutants() -> None:
    seeds = TARGETS["trace"].seeds()
    first, second = mutants(seeds, Random("a")), mutants(seeds, Random("a"))  # noqa: S311

    assert [next(first) for _ in range(300)] == [next(second) for _ in range(300)]
