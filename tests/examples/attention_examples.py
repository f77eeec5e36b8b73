"""How tests reach the attention examples, and the dense computation these are held against."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "examples" / "attention"

# Blocks of 4 are small enough to read; pages of 16 and heads of 64 are what fast backends take.
SIZES = pytest.mark.parametrize(("block_size", "head_dim"), [(4, 8), (16, 64)])


def load(name: str) -> ModuleType:
    """The example `name` as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_attention_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Softmax attention in float64: (tokens, heads, value_dim); visible: (queries, keys); bias: (heads, queries, keys)."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or 1 / math.sqrt(query.shape[2])) + bias
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def causal(num_queries: int, num_keys: int) -> Tensor:
    """(queries, keys) bool, the last query at the last key."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def empty(*shape: int) -> tuple[Tensor, Tensor]:
    """A cache for keys and one for values, NaN where nothing is written."""
    return torch.full(shape, torch.nan), torch.full(shape, torch.nan)


def slots_of(block_table: Tensor, block_size: int) -> Tensor:
    """The slots of positions 0, 1, ... of a sequence."""
    return (block_table.long()[:, None] * block_size + torch.arange(block_size)).flatten()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=1e-5, rtol=1e-5)
