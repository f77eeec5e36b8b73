"""What others' code raises in the middle of the engine's bookkeeping waits until its books are closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

__all__ = ["HeldErrors"]

P = ParamSpec("P")


class HeldErrors:
    """Calls what is not the engine's own, and keeps what that raises; `what` names it where several errors are raised as one."""

    __slots__ = ("_errors", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._errors: list[Exception] = []

    def call(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Call it; returns whether it raised nothing."""
        try:
            function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - it may raise anything, and must not take others along
            self._errors.append(error)
            return False
        return True

    def raise_all(self) -> None:
        """Raise what was kept, and forget it: one error as it is, several as an ExceptionGroup."""
        if self._errors:
            errors, self._errors = self._errors, []
            raise errors[0] if len(errors) == 1 else ExceptionGroup(f"{self._what} raised", errors)
