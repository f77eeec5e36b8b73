"""Linear layers on few tokens: the same product with its operands in the order that a CPU's library is fast at.

torch computes `x @ W.T`. For a handful of rows MKL then packs all of the weights, which are read once, to multiply them with next
to nothing; of `W @ x.T` it packs x. Times against `nn.Linear` (`python benchmarks/bench_engine.py --only products`) are in
docs/engine.md. Only float32: products of bf16 take another way, and gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["few_rows_forward", "gains_from_few_rows"]

MOST_ROWS = 5
MOST_ROWS_IF_WIDENING = 8
"""For layers of at least twice as many outputs as inputs: feed-forward layers, and the head most of all."""


def gains_from_few_rows(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a plain linear layer in float32 on a CPU, which nobody has wrapped."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and "forward" not in vars(module)
    )


def few_rows_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A stand-in for the module's `forward`; beyond a few rows it computes just what that does."""
    most_rows = MOST_ROWS_IF_WIDENING if module.out_features >= 2 * module.in_features else MOST_ROWS

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        num_rows = x.numel() // weight.shape[1]
        if not 2 <= num_rows <= most_rows:
            return linear(x, weight, bias)
        columns = x.reshape(num_rows, -1).t()
        out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return out.t().reshape(*x.shape[:-1], -1).contiguous()

    return forward
