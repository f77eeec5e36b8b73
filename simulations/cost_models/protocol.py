"""What the simulator, and a preemption policy, ask of a cost model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pagedkv.simulations.cost_models.load import Seconds, StepLoad

__all__ = ["CostModel", "TransferCosts"]


@runtime_checkable
class CostModel(Protocol):
    """Answers one question: how long does a step take?"""

    @property
    def name(self) -> str:
        """A short name for tables and file names."""
        ...

    def step_time(self, load: StepLoad) -> Seconds:
        """Seconds that the step takes: a float if every field that it depends on is an int, else (k,) float64.

        Element i of the array is bit for bit what the scalar call returns for step i: the simulator takes k
        identical decode steps at once, and its clock must not show that. So a formula is written once, with
        + * / in one order; `np.dot`, `np.sum` and `np.power` may round differently for arrays.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Every parameter with its unit in the key, as values that `json.dumps` takes; it goes in the report."""
        ...


@runtime_checkable
class TransferCosts(Protocol):
    """What "swap out or recompute?" has to know. Both cost models here answer it."""

    @property
    def prefill_s_per_token(self) -> float:
        """Marginal seconds to compute one more prompt token in a step that is already compute-bound."""
        ...

    @property
    def swap_s_per_block(self) -> float:
        """Seconds to move one block over the host link, in one direction; out and in again costs twice this."""
        ...
