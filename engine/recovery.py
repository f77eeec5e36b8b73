"""Who is to blame when the model raises."""

from __future__ import annotations

from pagedkv.engine.model import PagedModel
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.scheduler import Scheduler, StepPlan

__all__ = ["rows_that_raise"]


def rows_that_raise(model: PagedModel, scheduler: Scheduler, plan: StepPlan) -> dict[int, Exception]:
    """Rows of the plan for which the model raises when each is computed alone, with what it raised.

    If none does, the batch as a whole is to blame (its size, perhaps): then it is the row that was admitted last. Writes
    only slots of the plan in flight, which a failed plan gives up. One forward pass per row.
    """
    raised: dict[int, Exception] = {}
    for i, row in enumerate(plan.rows.tolist()):
        try:
            model.forward(StepInputs.of_row(plan, i, scheduler.block_tables, model.device))
        except Exception as error:  # noqa: BLE001 - whatever a model may raise
            raised[row] = error
    return raised
