"""Delta debugging: the shortest list of calls, with the smallest arguments, that still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from pagedkv.testing.random_operations import Operation

__all__ = ["shrink", "shrink_list"]

T = TypeVar("T")
Fails = Callable[[list[Operation]], bool]


def shrink(operations: list[Operation], fails: Fails, *, max_attempts: int = 5000) -> list[Operation]:
    """Leave out calls, then make arguments smaller, as long as `fails` says that the rest fails as the whole did.

    Stops when no single change helps, or after `max_attempts` tries: people wait for it.
    """
    attempts = iter(range(max_attempts))
    while True:
        before = operations
        operations = _without_runs(operations, fails, attempts)
        operations = _with_smaller_arguments(operations, fails, attempts)
        if operations == before:
            return operations


def shrink_list(items: list[T], fails: Callable[[list[T]], bool], *, max_attempts: int = 300) -> list[T]:
    """Leave out what is not needed, as long as `fails` says that the rest fails as the whole did."""
    attempts = iter(range(max_attempts))
    while True:
        before = items
        items = _without_runs(items, fails, attempts)
        if items == before:
            return items


def _without_runs(operations: list[T], fails: Callable[[list[T]], bool], attempts: Iterator[int]) -> list[T]:
    """Leave out runs of calls, long ones first, from the end on: what comes late is needed least."""
    length = max(1, len(operations) // 2)
    while True:
        start = len(operations) - length
        while start > -length:
            shorter = operations[: max(0, start)] + operations[max(0, start) + length :]
            if next(attempts, None) is None:
                return operations
            if len(shorter) < len(operations) and fails(shorter):
                operations = shorter
            start -= length
        if length == 1:
            return operations
        length //= 2


def _with_smaller_arguments(operations: list[Operation], fails: Fails, attempts: Iterator[int]) -> list[Operation]:
    for idx in range(len(operations)):
        improved = True
        while improved:
            improved = False
            for smaller in _smaller(operations[idx]):
                if next(attempts, None) is None:
                    return operations
                candidate = [*operations[:idx], smaller, *operations[idx + 1 :]]
                if fails(candidate):
                    operations, improved = candidate, True
                    break
    return operations


def _smaller(operation: Operation) -> Iterator[Operation]:
    """The same call with a shorter list, a smaller number or no salt."""
    for position, argument in enumerate(operation):
        before, after = operation[:position], operation[position + 1 :]
        if isinstance(argument, list) and argument:
            if len(argument) > 1:
                yield (*before, argument[: len(argument) // 2], *after)
            yield (*before, argument[:-1], *after)
            if any(argument):
                yield (*before, [0] * len(argument), *after)
        elif isinstance(argument, int) and argument > 1:
            yield (*before, argument // 2, *after)
            yield (*before, argument - 1, *after)
        elif isinstance(argument, bytes) and argument:
            yield (*before, b"", *after)
