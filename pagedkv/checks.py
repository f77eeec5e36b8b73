"""A memory that looks at itself while it works: a little after each operation, or all of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from itertools import cycle
from typing import Any, Literal, TypeAlias, get_args

from pagedkv.errors import ConfigError, InvariantViolation
from pagedkv.recount import check_some
from pagedkv.row_memory import RowMemory

__all__ = ["CheckLevel", "Checks", "as_check_level"]

CheckLevel: TypeAlias = Literal["off", "cheap", "full"]
"""off: nothing, at no cost. cheap: one row and one block in turn, O(1). full: a recount after each operation, O(blocks)."""

PROBE_EVERY = 64
"""Watched operations between two looks of the cheap level: what keeps it within 5 % of a scheduler's step, or of a call."""


def as_check_level(value: object) -> CheckLevel:
    """Return a level. Raises ConfigError for anything else."""
    for level in get_args(CheckLevel):
        if isinstance(value, str) and value == level:
            found: CheckLevel = level
            return found
    raise ConfigError(f"check must be one of {', '.join(get_args(CheckLevel))}, found {value!r:.60}")


class Checks:
    """Follows the operations of a manager, and of a scheduler on top of it, by replacing methods of these very objects.

    So objects that nobody watches run the code that they would run if this did not exist. A violation is raised as
    InvariantViolation by the operation after which it was found; it may have come about earlier.
    """

    def __init__(self, memory: RowMemory, level: CheckLevel) -> None:
        self._memory = memory
        self._level = level
        self._num_looks = 0
        # One call of C for each operation, where a counter of the object would be ten bytecodes: single calls feel it.
        self._is_due = cycle([False] * (PROBE_EVERY - 1) + [True])

    def watch(self, owner: object, verbs: Sequence[str], recount: Callable[[], None]) -> None:
        """Have these verbs of `owner` followed by a look at the memory; `recount` is the full one."""
        for verb in verbs:
            method = getattr(owner, verb)
            if self._level == "full":
                watched = _recounting(method, recount)
            elif verb == "try_append":
                watched = self._probing_append(method)
            else:
                watched = self._probing(method)
            setattr(owner, verb, watched)

    def _probing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        is_due = self._is_due

        @wraps(method)
        def probed(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if next(is_due):
                self._look(method.__name__)
            return result

        return probed

    def _probing_append(self, method: Callable[[Hashable, int], Any]) -> Callable[[Hashable, int], Any]:
        """As `_probing`; to pass on these very arguments costs half of passing on any, and most calls are this one."""
        is_due = self._is_due

        @wraps(method)
        def probed(sequence_id: Hashable, num_tokens: int) -> Any:
            result = method(sequence_id, num_tokens)
            if next(is_due):
                self._look(method.__name__)
            return result

        return probed

    def _look(self, verb: str) -> None:
        self._num_looks += 1
        try:
            check_some(self._memory, self._num_looks)
        except InvariantViolation as violation:
            raise _found_after(violation, verb) from None


def _recounting(method: Callable[..., Any], recount: Callable[[], None]) -> Callable[..., Any]:
    @wraps(method)
    def recounted(*args: Any, **options: Any) -> Any:
        raised: BaseException | None = None
        try:
            return method(*args, **options)
        except BaseException as error:
            raised = error
            raise
        finally:  # What raised must have changed nothing, so it is followed by a recount, too.
            try:
                recount()
            except InvariantViolation as violation:
                raise _found_after(violation, method.__name__) from raised

    return recounted


def _found_after(violation: InvariantViolation, verb: str) -> InvariantViolation:
    message = str(violation).removeprefix(f"{violation.invariant}: ")
    return InvariantViolation(violation.invariant, f"{message}; found after {verb}")
