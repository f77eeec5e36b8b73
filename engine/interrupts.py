"""Ctrl-C in the middle of the engine's bookkeeping waits until its books are closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import current_thread, main_thread
from typing import ParamSpec, TypeVar

__all__ = ["interruptible", "uninterrupted"]

P = ParamSpec("P")
T = TypeVar("T")


class _Hold:
    """Stands in for Python's own handler, which would raise KeyboardInterrupt between any two lines.

    One for the process, as signals are: they come to the main thread only.
    """

    __slots__ = ("is_noted", "is_open")

    def __init__(self) -> None:
        self.is_noted = False
        self.is_open = False

    def __call__(self, _number: int, _frame: object) -> None:
        if self.is_open:
            raise KeyboardInterrupt
        self.is_noted = True

    def raise_noted(self) -> None:
        if self.is_noted:
            self.is_noted = False
            raise KeyboardInterrupt


_HOLD = _Hold()


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """Hold Ctrl-C back while `function` runs, but for what it does within `interruptible`; raise it at the end.

    Other threads, and a program with a SIGINT handler of its own, are left alone. About 2 µs a call.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # While this holds already, the handler is not Python's own either.
        if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return function(*args, **kwargs)
        signal.signal(signal.SIGINT, _HOLD)
        try:
            return function(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _HOLD.raise_noted()

    return call


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C through again, for what takes long and can be taken back."""
    if current_thread() is not main_thread():
        yield
        return
    _HOLD.raise_noted()
    _HOLD.is_open = True
    try:
        yield
    finally:
        _HOLD.is_open = False
