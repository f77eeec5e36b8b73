"""Decode steps through captured graphs: one launch instead of a thousand."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import cdiv
from pagedkv.engine.device.block_tables import DeviceBlockTables
from pagedkv.engine.device.decode_step import DecodeStep
from pagedkv.engine.model import PagedModel
from pagedkv.engine.transfers import sent
from pagedkv.scheduler import StepPlan

__all__ = ["DecodeGraphs", "GraphCapture", "bucket_sizes"]

Run = Callable[[], None]
MAX_TABLE_BYTES = 2**26
"""Of the block tables that graphs read. 256 rows of 128 Ki tokens in blocks of 16 take an eighth of it."""


class GraphCapture(Protocol):
    """Makes graphs: CudaCapture is one."""

    def warm_up(self, run: Run) -> None:
        """Run it for real, once, in order with the work around it; what it raises is an error of `run`'s own."""

    def capture(self, run: Run) -> Run:
        """What has the effect of `run` on the tensors at the same addresses. Raises anything if that cannot be had."""


def bucket_sizes(max_rows: int) -> list[int]:
    """Numbers of rows for which there is a graph: 1, 2, 4, then multiples of 8, and `max_rows`.

    >>> bucket_sizes(20)
    [1, 2, 4, 8, 16, 20]
    """
    return [size for size in (1, 2, 4) if size < max_rows] + [*range(8, max_rows, 8), max_rows]


class DecodeGraphs:
    """Runs the steps in which every row computes one token, each through the graph of the next larger size.

    A graph is captured when a step of its size first comes. The step itself is served by the warm-up before that, so
    nothing is computed in vain. If a capture fails, one warning names the reason, all graphs are given up, and `forward`
    returns None from then on: the caller runs such steps as any other. Without `capture`, a graph is a plain call of the
    model on the same padded inputs; that is for tests, and for devices without graphs.

    Owned and shared by graphs of all sizes, which run one at a time: the block tables (max_rows, width) int32, and the
    logits (max_rows, vocabulary), which every graph copies its own into, for else each would keep its own. One width for
    all, and no buckets of it: the op's time depends on lengths and not on the width, the tables of 256 rows of 128 Ki tokens take
    8 MiB, and only what a step uses is gathered. A step with longer tables than `width` is not for a graph.

    Loading, graph and the reading of logits follow each other on the current stream, which must be the same in each step.
    Sampling reads the logits there too, so the next step's graph, which overwrites them, waits for it.

    With `num_rows` rows in a bucket of `size`, a step transfers 12 * size bytes, for each kind of attention layer
    24 * (size + spare) + 16 * size bytes (spare: four tasks for each worker of the op), and 16 bytes for each block begun.
    """

    def __init__(
        self, model: PagedModel, *, max_rows: int, max_width: int, capture: GraphCapture | None = None
    ) -> None:
        """Make the buffers.

        max_rows:  rows of the largest step, the scheduler's `max_num_running`
        max_width: blocks of the longest sequence
        """
        self._model = model
        self._capture = capture
        self._sizes = bucket_sizes(max_rows)
        self._block_tables = torch.zeros(
            (max_rows, max(1, min(max_width, MAX_TABLE_BYTES // (4 * max_rows)))),
            dtype=torch.int32,
            device=model.device,
        )
        self._logits: Tensor | None = None
        self._steps: dict[int, DecodeStep] = {}
        self._replays: dict[int, Run] = {}
        self.is_given_up = False
        """Whether a capture failed: every step is then for the caller."""

    def forward(self, plan: StepPlan, tables: DeviceBlockTables) -> Tensor | None:
        """The step's logits, (logits, vocabulary), one row per logit index; None, with nothing done, if it is not for a graph.

        `tables` are up to date with the plan. The logits may be a view of what the next step overwrites.
        """
        if not self.covers(plan):
            return None
        # In one mode from first to last: a plan that a model's layer asked for within it is renewed within it only.
        with torch.inference_mode(), _on(self._model.device):
            size = self._sizes[bisect_left(self._sizes, plan.num_rows)]
            step = self._steps.get(size)
            if step is None:
                step = self._steps[size] = DecodeStep(self._block_tables[:size], self._model.block_size)
            step.load(plan, tables)
            replay = self._replays.get(size)
            if replay is not None:
                replay()
            else:
                self._run_first(step)
            return self._logits_of(plan)

    def covers(self, plan: StepPlan) -> bool:
        """Whether the plan is of a kind and size for which there is a graph, or may be. O(rows)."""
        num_rows = plan.num_rows
        return (
            not self.is_given_up
            and plan.drafts is None
            and 0 < num_rows <= self._sizes[-1]
            and int(plan.num_tokens.max()) == 1
            and cdiv(int(plan.starts.max()) + 1, self._model.block_size) <= self._block_tables.shape[1]
        )

    def _run_first(self, step: DecodeStep) -> None:
        """Run a step for whose size there is no graph yet, and make one."""
        run = partial(self._run, step)
        if self._capture is None:
            run()
            self._replays[step.size] = run
            return
        self._capture.warm_up(run)
        try:
            self._replays[step.size] = self._capture.capture(run)
        except Exception as error:  # noqa: BLE001 - a model's code may raise anything where it cannot do what it is used to
            self._give_up(error)

    def _run(self, step: DecodeStep) -> None:
        """What a graph holds."""
        step.unpack()
        logits = self._model.forward(step)
        if self._logits is None:  # In a warm-up.
            shape = (self._sizes[-1], logits.shape[1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        self._logits[: step.size].copy_(logits)

    def _logits_of(self, plan: StepPlan) -> Tensor:
        logits = self._logits
        if logits is None:  # pragma: no cover - the first run makes them
            raise RuntimeError("there are no logits before the first run")
        indices = plan.logit_indices
        if np.array_equal(indices, np.arange(plan.num_rows)):
            return logits[: plan.num_rows]
        return logits.index_select(0, sent(indices, logits.device))

    def _give_up(self, error: Exception) -> None:
        self.is_given_up = True
        self._steps.clear()
        self._replays.clear()
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        name = type(self._model.model).__name__
        warnings.warn(
            f"decode steps of {name} run without CUDA graphs, for it could not be captured: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one: streams are its own then, and an attention plan made on the host is for it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
