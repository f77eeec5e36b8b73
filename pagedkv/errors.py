"""The three kinds of errors: expected shortage, the caller's mistake, and a bug of ours. They are never mixed."""

from __future__ import annotations

__all__ = [
    "BlockStateError",
    "ConfigError",
    "DuplicateIdError",
    "InvalidArgumentError",
    "InvariantViolation",
    "OutOfBlocksError",
    "PagedKVError",
    "SavedBlocksError",
    "StalePlanError",
    "TraceError",
    "UnknownIdError",
]


class PagedKVError(Exception):
    """Base of every error that pagedkv raises on purpose."""


class OutOfBlocksError(PagedKVError):
    """Expected shortage: more blocks were asked for than can be had now. The `try_...` verbs return None instead.

    `kind` says whose they are where both pools could be meant: "device" or "host".
    """

    def __init__(self, num_requested: int, num_free: int, kind: str = "") -> None:
        blocks = f"{kind} blocks" if kind else "blocks"
        super().__init__(f"{num_requested} {blocks} requested, {num_free} can be had (free and evictable)")
        self.num_requested = num_requested
        self.num_free = num_free


class InvalidArgumentError(PagedKVError, ValueError):
    """The caller's mistake: an argument outside its documented domain. Nothing has changed."""


class ConfigError(InvalidArgumentError):
    """A configuration that contradicts itself or exceeds a documented cap."""


class BlockStateError(PagedKVError, ValueError):
    """The caller's mistake: a block id that is unknown, or not in the state that the verb needs (a double release)."""


class UnknownIdError(PagedKVError, KeyError):
    """The caller's mistake: no live sequence or request has this id."""

    def __str__(self) -> str:  # KeyError would show the repr of the whole message.
        return str(self.args[0]) if self.args else ""


class DuplicateIdError(PagedKVError, ValueError):
    """The caller's mistake: a live sequence or request has this id already."""


class StalePlanError(PagedKVError, ValueError):
    """The caller's mistake: a plan that is not the one in flight, or is read after its tables have moved on."""


class SavedBlocksError(PagedKVError, ValueError):
    """A file of saved blocks that cannot be used: damaged, made for another model, or no such file at all."""


class TraceError(PagedKVError, ValueError):
    """A request trace that cannot be read: one line with file, line number, what was expected and what was found."""


class InvariantViolation(PagedKVError):  # noqa: N818 - the specification's own word
    """A bug of ours: a recount from the tables contradicts a promise. `invariant` is its id in docs/invariants.md."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
