"""Fit the constants of the linear cost model to measured steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.cost_models.linear import LinearCostModel
from pagedkv.simulations.cost_models.load import StepLoad

__all__ = ["CONSTANTS", "MIN_STEPS", "StepFit", "fit_steps"]

CONSTANTS = (
    "base_s",
    "per_token_s",
    "per_context_token_s",
    "per_row_s",
    "per_attention_pair_s",
    "per_swapped_block_s",
    "per_copied_block_s",
)
"""In the order in which they are kept where steps cannot tell them apart: simpler explanations first."""

MIN_STEPS = 10
MAX_ROUNDS = 30
HUBER_K = 1.345
"""Residuals beyond this many scales count less: 95 % of the efficiency of plain least squares for normal noise (Huber 1981)."""
MAD_TO_SIGMA = 1.4826
SMALLEST_SCALE = 1e-9
SMALLEST_VARIANCE = 1e-24
"""In squares of the mean: less is rounding, not variance."""
DEPENDENCE = 1e-6
"""A column of which a smaller share is left, once the columns before it are taken out, cannot be told from them."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class StepFit:
    """A fitted model, and how well it describes the steps that it was fitted to.

    standard_errors:  of each constant that was fitted; None for the others
    unidentified:     constants that the steps cannot determine, with the reason; they are 0 in the model
    median_error, p90_error: of |model - measured| / measured over the steps
    r_squared:        share of the variance of the step times that the model explains; None if they do not vary
    num_outliers:     steps that took more than twice, or less than half, of what the model says
    total_measured_s, total_model_s: sum of all step times
    """

    model: LinearCostModel
    num_steps: int
    standard_errors: dict[str, float | None]
    unidentified: dict[str, str]
    median_error: float
    p90_error: float
    r_squared: float | None
    num_outliers: int
    total_measured_s: float
    total_model_s: float

    def describe(self) -> dict[str, Any]:
        """All but the model itself, for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}


def fit_steps(load: StepLoad, durations: Floats) -> StepFit:
    """Fit the linear model's constants, none below 0, to (k,) steps that took `durations` seconds, all above 0.

    Least squares of the *relative* error, so that a decode step of 10 ms counts as much as a prefill step of 1 s. No step
    is left out: one that is far from the others (the first ones, which warm up, or a pause of the machine) counts as if it
    were 1.345 times the usual error off (Huber's estimator, by reweighting), which bounds what it can do. Deterministic. O(k).

    Raises InvalidArgumentError for fewer than 10 steps, and for times that leave every constant of a step at 0.
    """
    if len(durations) < MIN_STEPS:
        raise InvalidArgumentError(f"a fit needs at least {MIN_STEPS} steps, found {len(durations)}")
    if not (np.isfinite(durations).all() and durations.min() > 0):
        raise InvalidArgumentError("every step must take a finite time above 0 s")
    columns = _columns_of(load, len(durations))
    kept, unidentified = _identify(columns / durations[:, None])
    used = columns[:, kept]
    values, errors = _fit_robustly(used, durations)
    names = [CONSTANTS[i] for i in kept]
    constants = dict.fromkeys(CONSTANTS, 0.0) | dict(zip(names, values.tolist(), strict=True))
    model = LinearCostModel(**constants)
    predicted = columns @ np.array([constants[name] for name in CONSTANTS])
    relative = np.abs(predicted - durations) / durations
    variance = float(((durations - durations.mean()) ** 2).mean())
    has_variance = variance > SMALLEST_VARIANCE * float(durations.mean()) ** 2
    explained = 1 - float(((durations - predicted) ** 2).mean()) / variance if has_variance else None
    return StepFit(
        model=model,
        num_steps=len(durations),
        standard_errors=dict.fromkeys(CONSTANTS) | dict(zip(names, errors, strict=True)),
        unidentified=unidentified,
        median_error=float(np.median(relative)),
        p90_error=float(np.quantile(relative, 0.9)),
        r_squared=explained,
        num_outliers=int(np.count_nonzero((durations > 2 * predicted) | (durations < predicted / 2))),
        total_measured_s=float(durations.sum()),
        total_model_s=float(predicted.sum()),
    )


def _columns_of(load: StepLoad, num_steps: int) -> Floats:
    """(k, 7): what each constant is multiplied by, in the order of CONSTANTS."""
    fields = (
        1,
        load.num_tokens,
        load.num_context_tokens,
        load.num_rows,
        load.num_attention_pairs,
        load.num_swapped_in_blocks + load.num_swapped_out_blocks,
        load.num_copied_blocks,
    )
    return np.stack([np.broadcast_to(np.asarray(field, np.float64), num_steps) for field in fields], axis=1)


def _identify(weighted: Floats) -> tuple[list[int], dict[str, str]]:
    """Indices of the columns that can be told apart, and why the others cannot."""
    norms = np.sqrt((weighted**2).sum(axis=0))
    triangle = _triangle(weighted / np.where(norms > 0, norms, 1.0))
    kept: list[int] = []
    unidentified = {}
    for i, name in enumerate(CONSTANTS):
        if norms[i] == 0:
            unidentified[name] = "no step had any"
            continue
        shares = np.linalg.lstsq(triangle[:, kept], triangle[:, i], rcond=None)[0]
        if np.linalg.norm(triangle[:, i] - triangle[:, kept] @ shares) > DEPENDENCE:
            kept.append(i)
        else:
            others = [CONSTANTS[j] for j, share in zip(kept, shares.tolist(), strict=True) if abs(share) > DEPENDENCE]
            unidentified[name] = (
                f"cannot be told apart from {' and '.join(others)} in these steps, and is counted there"
            )
    return kept, unidentified


def _fit_robustly(columns: Floats, durations: Floats) -> tuple[Floats, list[float | None]]:
    """Constants, none below 0, and their standard errors (None at the bound), by iteratively reweighted least squares."""
    weights = 1 / durations
    values = np.zeros(columns.shape[1])
    for _ in range(MAX_ROUNDS):
        before = values
        values, covariance = _fit_non_negative(columns * weights[:, None], durations * weights)
        predicted = columns @ values
        # Relative to the model, not to the measurement: the latter would favour steps that happened to be fast.
        scaled = 1 / np.maximum(predicted, durations.min() / 2)
        residuals = np.abs(durations - predicted) * scaled
        scale = max(MAD_TO_SIGMA * float(np.median(residuals)), SMALLEST_SCALE)
        weights = scaled * np.sqrt(np.minimum(1.0, HUBER_K * scale / np.maximum(residuals, SMALLEST_SCALE)))
        if np.abs(values - before).max() <= 1e-10 * np.abs(values).max():
            break
    errors = [float(scale * np.sqrt(c)) if value > 0 else None for value, c in zip(values, covariance, strict=True)]
    return values, errors


def _fit_non_negative(matrix: Floats, target: Floats) -> tuple[Floats, Floats]:
    """The x >= 0 that minimises |matrix x - target|, and the diagonal of the inverse of the normal matrix.

    The best x is the plain least squares over its non-zero entries, so the best feasible one of all subsets of columns is
    it. At most seven columns make 127 problems of 8 by 7, which beats an active-set method in simplicity, not in time.
    """
    norms = np.sqrt((matrix**2).sum(axis=0))
    triangle = _triangle(np.column_stack((matrix / norms, target)))
    matrix, target = triangle[:, :-1], triangle[:, -1]
    num_columns = matrix.shape[1]
    best, least = np.zeros(num_columns), float(np.linalg.norm(target))
    for chosen in product((True, False), repeat=num_columns):
        indices = list(compress(range(num_columns), chosen))
        if not indices:
            continue
        solution = np.linalg.lstsq(matrix[:, indices], target, rcond=None)[0]
        rest = float(np.linalg.norm(target - matrix[:, indices] @ solution))
        if solution.min() >= 0 and rest < least:
            best, least = np.zeros(num_columns), rest
            best[indices] = solution
    support = np.flatnonzero(best)
    variances = np.zeros(num_columns)
    if len(support):
        normal = matrix[:, support].T @ matrix[:, support]
        variances[support] = np.diag(np.linalg.pinv(normal))
    return best / norms, variances / norms**2


def _triangle(matrix: Floats) -> Floats:
    """A triangle whose columns have the lengths and angles of the matrix's own: all that least squares needs. O(k)."""
    return np.asarray(np.linalg.qr(matrix, mode="r"), np.float64)
