"""The error that ends a run under faults: what did not hold, where, and the one command that does it again (F17)."""

from __future__ import annotations

from pagedkv.errors import PagedKVError

__all__ = ["RunFailedError"]


class RunFailedError(PagedKVError):
    """Something did not hold. `invariant` is its id, None for an error of another kind; `command` repeats the failure."""

    def __init__(self, error: BaseException, where: str, command: str) -> None:
        self.invariant: str | None = getattr(error, "invariant", None)
        self.command = command
        what = str(error) if isinstance(error, PagedKVError) else f"{type(error).__name__}: {error}"
        super().__init__(f"{what} ({where}); again with: {command}")
