"""Names for the arrays that travel between the parts, and the one way in which caller's numbers become them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import InvalidArgumentError

__all__ = [
    "BlockIds",
    "FEW",
    "Int32s",
    "Int64s",
    "MAX_NUM_BLOCKS",
    "MAX_TOKENS",
    "Rows",
    "as_int",
    "as_time",
    "as_token_ids",
    "cdiv",
    "keep_int",
    "packed_runs",
    "shown",
]

Int32s: TypeAlias = NDArray[np.int32]
Int64s: TypeAlias = NDArray[np.int64]
BlockIds: TypeAlias = Int64s
"""(n,) int64: indices of blocks in their pool. numpy indexes by int64 up to seven times faster than by int32."""
Rows: TypeAlias = Int64s
"""(n,) int64: indices of live sequences in the columnar tables."""

MAX_TOKEN_ID = 2**31 - 1
MAX_TOKENS = 2**26
"""Documented cap on the tokens of one sequence."""
MAX_NUM_BLOCKS = 2**28
"""Documented cap on the blocks of a pool and of its policy: 4.3 billion token slots at 16 tokens a block."""
MAX_SHOWN_CHARS = 60
FEW = 32
"""Python's own containers beat array operations on so many numbers."""
ONLY_INTS = {int}
BOOLEANS = {bool, np.bool_}


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up.

    >>> cdiv(33, 16)
    3
    """
    return -(-numerator // denominator)


def packed_runs(firsts: Int64s, counts: Int64s) -> Int64s:
    """`firsts[i]` to `firsts[i] + counts[i] - 1` for every i, one run after the other. O(total).

    >>> packed_runs(np.array([3, 10]), np.array([2, 1])).tolist()
    [3, 4, 10]
    """
    stops = counts.cumsum()
    total = int(stops[-1]) if len(stops) else 0
    runs: Int64s = (firsts - stops + counts).repeat(counts) + np.arange(total)
    return runs


def shown(value: object) -> str:
    """A value for an error message: its repr, at most 60 characters of it, whatever the value is.

    >>> shown("a" * 100)[-6:]
    'aaa...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def as_int(name: str, value: object, *, at_least: int, at_most: int) -> int:
    """Return `value` as an int if it is a whole number in `at_least..at_most`; booleans and floats are not.

    Raises InvalidArgumentError with the name, the range and the value.
    """
    if value.__class__ is int and at_least <= value <= at_most:
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidArgumentError(f"{name} must be a whole number, found {shown(value)}")
    if not at_least <= value <= at_most:
        raise InvalidArgumentError(f"{name} must be in {at_least}..{at_most}, found {shown(int(value))}")
    return int(value)


def keep_int(owner: object, name: str, *, at_least: int, at_most: int) -> None:
    """Replace a field of a frozen dataclass by what `as_int` makes of it: JSON knows no numbers of numpy's."""
    object.__setattr__(owner, name, as_int(name, getattr(owner, name), at_least=at_least, at_most=at_most))


def as_time(now: float) -> float:
    """Return `now` as a float. Raises InvalidArgumentError unless it is a finite number: orders and logs depend on it."""
    if isinstance(now, np.integer | np.floating):
        now = float(now)
    # Written so that NaN, which compares false with everything, and whole numbers beyond floats are refused as well.
    if not isinstance(now, float | int) or not abs(now) <= sys.float_info.max:
        raise InvalidArgumentError(f"now must be a finite number of seconds, found {shown(now)}")
    return float(now)


def _array_of(values: Iterable[int]) -> NDArray[Any]:
    """The values as an array. Raises TypeError for a text, ValueError for booleans among numbers or more than `MAX_TOKENS`."""
    if isinstance(values, str):
        raise TypeError("tokenise it first")
    listed = _listed(values)
    array = np.asarray(listed)
    # numpy takes booleans among numbers for 0 and 1. Types are looked at only where there are such numbers.
    if array.dtype.kind in "iu" and array.size and array.min() <= 1 and not BOOLEANS.isdisjoint(map(type, listed)):
        raise ValueError("booleans are among them")
    return array


def _listed(values: Iterable[int]) -> list[int]:
    """The values as a list. Raises ValueError for more than `MAX_TOKENS`, before memory is taken for them if they tell."""
    num_told = len(values) if isinstance(values, Sized) else 0
    if num_told <= MAX_TOKENS:
        listed = list(islice(values, num_told or MAX_TOKENS + 1))
        if len(listed) <= MAX_TOKENS:
            return listed
    raise ValueError(f"more than {MAX_TOKENS} of them")


def as_token_ids(name: str, values: Iterable[int] | Int32s) -> Int32s:
    """Return token ids as a (n,) int32 array. Raises InvalidArgumentError unless all are whole, 0..2^31-1. O(n).

    At most 2^26 of anything but an array are looked at. No error shows a token that could be one of a prompt.
    """
    if (
        values.__class__ is list
        and 0 < len(values) <= FEW
        and set(map(type, values)) == ONLY_INTS
        and min(values) >= 0
        and max(values) <= MAX_TOKEN_ID
    ):
        return np.array(values, np.int32)
    try:
        array = values if isinstance(values, np.ndarray) else _array_of(values)
    except (TypeError, ValueError, OverflowError) as error:
        found = type(values).__name__
        raise InvalidArgumentError(f"{name} must be one row of whole numbers, found {found}: {error}") from None
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        advice = ": tokenise it first" if array.dtype.kind == "U" else ""
        found = f"{array.dtype} of {array.shape}"
        raise InvalidArgumentError(f"{name} must be one row of whole numbers, found {found}{advice}")
    # No int32 is too large, and a step's tokens usually are int32: one pass less.
    if np.minimum.reduce(array) < 0 or (array.dtype != np.int32 and np.maximum.reduce(array) > MAX_TOKEN_ID):
        wrong = array.min() if array.min() < 0 else array.max()
        raise InvalidArgumentError(f"{name} must be in 0..{MAX_TOKEN_ID}, found {wrong}")
    return array.astype(np.int32)
