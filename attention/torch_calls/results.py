"""Results on their way to the caller's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall

__all__ = ["store"]


def store(call: AttentionCall, tokens: Tensor | slice, out: Tensor, lse: Tensor) -> None:
    """Count the sinks, then write out (..., q_heads, value_dim) and lse (..., q_heads) of `tokens`."""
    if call.sinks is not None:
        with_sink = torch.logaddexp(lse, call.sinks.to(lse.dtype))
        # A sink may be -inf, as good as none.
        out = out * (lse - with_sink.masked_fill(with_sink == -torch.inf, 0)).exp()[..., None]
        lse = with_sink
    call.out[tokens] = out.to(call.out.dtype)
    if call.lse is not None:
        call.lse[tokens] = lse.to(call.lse.dtype)
