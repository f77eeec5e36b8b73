"""Where calls can be known: the compiled kernel, and a torch that shows its tensors to C."""

from __future__ import annotations

import pytest
from torch import Tensor

from pagedkv.attention.backends import backend_named
from pagedkv.attention.cpu import library

__all__ = ["TABLE", "CheckedError", "needs_known_calls"]

TABLE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
needs_known_calls = pytest.mark.skipif(
    backend_named("cpu").unavailable() is not None or library._python_of(TABLE) is None,
    reason="no compiled kernel, or a torch that does not show its tensors to C",
)


class CheckedError(Exception):
    """Raised in the place of checks."""
