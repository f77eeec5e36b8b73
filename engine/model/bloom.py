"""Bloom: the one supported family that does not call transformers' attention interface. Its scores carry ALiBi."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.engine.model.layers import LayerShape

__all__ = ["bloom_forward", "bloom_shape", "is_bloom_attention"]


def is_bloom_attention(module: nn.Module) -> bool:
    """Whether this is Bloom's attention module."""
    return type(module).__name__ == "BloomAttention"


def alibi_slopes(num_heads: int) -> Tensor:
    """(num_heads,) float32: slopes of Press et al., "Train short, test long", ICLR 2022, section 3, as Bloom takes them.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** (-8.0 / power)
    slopes = [base ** (i + 1) for i in range(power)]
    between = 2.0 ** (-4.0 / power)
    slopes += [between ** (2 * i + 1) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def bloom_shape(module: Any) -> LayerShape:
    """What one of Bloom's layers asks of the op. Adding slope * key position is ALiBi: softmax ignores the query's share."""
    return LayerShape(
        module,
        module.num_heads,
        module.num_heads,
        module.head_dim,
        module.head_dim,
        scale=float(module.inv_norm_factor),
        alibi_slopes=alibi_slopes(module.num_heads).to(module.query_key_value.weight.device),
    )


def bloom_forward(module: Any, attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """A stand-in for the module's `forward` that hands queries, keys and values to `attention`."""

    def forward(hidden_states: Tensor, residual: Tensor, **_kwargs: Any) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        out, _ = attention(module, query, key, value)
        return module.dense(out.flatten(2)) + residual, None

    return forward
