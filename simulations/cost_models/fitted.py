"""A fitted cost model as a file: what `pagedkv fit` writes and `pagedkv replay --cost-model` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models.fitting import CONSTANTS, StepFit
from pagedkv.simulations.cost_models.linear import LinearCostModel
from pagedkv.simulations.file_errors import about, describe_os_error

__all__ = ["load_cost_model", "save_cost_model"]

VERSION = 1
MAX_BYTES = 2**20
MIN_STEP_S = 1e-9
MAX_CONSTANT_S = 1e6
"""Seconds for one step, token or block: eleven days. Far beyond it the clock of a replay would overflow."""


def save_cost_model(fit: StepFit, path: str | Path, source: Mapping[str, Any]) -> None:
    """Write the constants, how good the fit is, and `source`: facts about the run. The file appears whole or not at all."""
    document = {
        "pagedkv_cost_model": VERSION,
        **fit.model.describe(),
        "fit": fit.describe(),
        "source": dict(source),
    }
    target = Path(path)
    partial = target.parent / f"{target.name}.part"  # `with_name` raises for a folder such as "."
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:  # Of the file that was asked for, not of the part that goes before it.
        raise about(target, error) from None
    finally:
        partial.unlink(missing_ok=True)


def load_cost_model(path: str | Path) -> LinearCostModel:
    """Read a model that `save_cost_model` wrote; other keys than the constants are for people.

    Raises ConfigError, one line with the path, for anything else.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, found {describe_os_error(error)}") from None
    try:
        document = json.loads(content) if len(content) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a cost model that `pagedkv fit` wrote, found something else")
    version, kind = document.get("pagedkv_cost_model"), document.get("kind")
    if version != VERSION or kind != "linear":
        raise ConfigError(
            f"{path}: expected a linear cost model of version {VERSION}, found kind {kind!r:.60}, version {version!r:.60}"
        )
    missing = [name for name in CONSTANTS if name not in document]
    if missing:
        raise ConfigError(f"{path}: expected a key {missing[0]!r}, found none")
    try:
        model = LinearCostModel(**{name: document[name] for name in CONSTANTS})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error!s:.200}") from None
    for name in CONSTANTS:
        value = getattr(model, name)
        if value > MAX_CONSTANT_S:
            raise ConfigError(f"{path}: expected {name} of at most {MAX_CONSTANT_S:,.0f} s, found {value:g}")
    least_s = model.base_s + model.per_token_s + model.per_row_s
    if least_s < MIN_STEP_S:
        raise ConfigError(f"{path}: expected steps of at least {MIN_STEP_S:g} s, found {least_s:g}")
    return model
