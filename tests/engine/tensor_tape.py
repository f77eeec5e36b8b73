"""What a CUDA graph does, on the CPU: records the tensor operations of a run, and repeats them on the same memory.

Nothing of Python is repeated, as in a graph: a number that the host worked out for one step is still there in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TapeCapture"]

WAITING = ("aten::_local_scalar_dense", "aten::nonzero")


class Tape(TorchDispatchMode):
    """Records the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITING:
            raise RuntimeError(f"{func.name()} waits for the device\nwhich no capture allows")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        """The same operations on the same memory; what was allocated then is written now."""
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapeCapture:
    """Makes tapes for graphs, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def warm_up(self, run: Callable[[], None]) -> None:
        self.asked.append("warm_up")
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.asked.append("capture")
        tape = Tape()
        with tape:
            run()

        def repeat() -> None:
            self.asked.append("repeat")
            tape.repeat()

        return repeat
