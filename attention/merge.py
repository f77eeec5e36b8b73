"""Two partial results of attention over different keys, put together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_states"]


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from attention over the keys of each.

    out_a, out_b: (tokens, q_heads, value_dim); lse_a, lse_b: (tokens, q_heads), natural logarithm, -inf where nothing was
    seen. A sink may be counted in one of them only. Returns out, in out_a's dtype, and lse. O(elements).

    Source: the associativity of softmax states, Ye et al., "Cascade Inference", 2024; FlashInfer, arXiv:2501.01005, 2.2.
    """
    highest = torch.maximum(lse_a, lse_b)
    base = highest.masked_fill(highest == -torch.inf, 0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    share_a = torch.where(total > 0, weight_a / total, 0)[..., None]
    share_b = torch.where(total > 0, weight_b / total, 0)[..., None]
    # A part that saw nothing may hold anything, NaN included.
    out = torch.where(share_a > 0, out_a * share_a, 0) + torch.where(share_b > 0, out_b * share_b, 0)
    return out.to(out_a.dtype), base + torch.log(total)
