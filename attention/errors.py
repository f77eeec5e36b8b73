"""What attention refuses: a call that contradicts itself, and a call that a backend cannot serve."""

from __future__ import annotations

from pagedkv.errors import InvalidArgumentError, PagedKVError

__all__ = ["AttentionArgumentError", "BackendUnsupportedError"]


class AttentionArgumentError(InvalidArgumentError):
    """The caller's mistake: a shape, dtype, device, length or table entry that does not fit. No kernel has run."""


class BackendUnsupportedError(PagedKVError, NotImplementedError):
    """The backend that was asked for cannot run here, or cannot do what the call needs; the message names it."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"the {backend} backend cannot serve this call: {reason}")
        self.backend = backend
        self.reason = reason
