"""What to do about a step that raised: try it again, then find out which requests are to blame."""

from __future__ import annotations

from pagedkv.engine.errors import ModelStepError
from pagedkv.engine.live_requests import LiveRequest
from pagedkv.engine.model import PagedModel
from pagedkv.engine.row_columns import RowColumns
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.scheduler import Scheduler, StepPlan

__all__ = ["Recovery"]


class Recovery:
    """Says, of each step that raised, whose requests are to be ended; those of a first failure in a row are not."""

    __slots__ = ("_has_failed", "_model", "_rows", "_scheduler")

    def __init__(self, model: PagedModel, scheduler: Scheduler, rows: RowColumns) -> None:
        self._model = model
        self._scheduler = scheduler
        self._rows = rows
        self._has_failed = False
        """Whether the last step failed, and nobody was to blame yet."""

    def step_succeeded(self) -> None:
        """The next failure is a first one."""
        self._has_failed = False

    def blame(self, plan: StepPlan, error: Exception) -> list[tuple[LiveRequest, ModelStepError]]:
        """Requests to end, each with its error, before the step is planned again; none if it was not tried again yet.

        Call it while the plan is in flight, and its `admitted` have their rows.
        """
        self._has_failed = not self._has_failed
        if self._has_failed:
            return []
        raised = self._rows_that_raise(plan) or dict.fromkeys(plan.rows[-1:].tolist(), error)
        guilty: dict[str, tuple[LiveRequest, ModelStepError]] = {}
        for row, cause in raised.items():
            sample = self._rows.samples[row]
            if sample is not None and sample.request.request_id not in guilty:
                guilty[sample.request.request_id] = (sample.request, _failure_of(sample.request, cause))
        return list(guilty.values())

    def _rows_that_raise(self, plan: StepPlan) -> dict[int, Exception]:
        """Rows of the plan for which the model raises when each is computed alone, with what it raised.

        If none does, the batch as a whole is to blame (its size, perhaps): then it is the row that was admitted last.
        Writes only slots of the plan in flight, which a failed plan gives up. One forward pass per row.
        """
        raised: dict[int, Exception] = {}
        for i, row in enumerate(plan.rows.tolist()):
            try:
                self._model.forward(StepInputs.of_row(plan, i, self._scheduler.block_tables, self._model.device))
            except Exception as error:  # noqa: BLE001 - whatever a model may raise
                raised[row] = error
        return raised


def _failure_of(request: LiveRequest, cause: Exception) -> ModelStepError:
    error = ModelStepError(f"the model raised {type(cause).__name__} in request {request.request_id!r}: {cause}")
    error.__cause__ = cause
    return error
