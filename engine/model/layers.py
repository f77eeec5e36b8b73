"""One attention layer of a bound model: writes the step's keys and values, then attends through the block tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.attention import paged_attention, write_kv
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.kv_spec import KVSpec
from pagedkv.storage import KVStorage

__all__ = ["LayerShape", "LatentShape", "PagedLayer"]


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Head sizes of multi-head latent attention before absorption: position-free, rotary and value channels."""

    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerShape:
    """What one attention layer asks of the op.

    module:       the layer's attention module
    head_dim, value_dim: channels of a cached key and value; of a latent, with and without its rotary part
    scale:        of the scores
    window:       keys that a query sees, its own included; None for all
    softcap:      of the scores, None for none
    sinks:        (num_q_heads,) float32, or None
    alibi_slopes: (num_q_heads,) float32, or None
    latent:       for multi-head latent attention, else None
    """

    module: nn.Module
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    latent: LatentShape | None = None

    def kv_spec(self, num_layers: int, dtype: str, block_size: int) -> KVSpec:
        """The K/V of a model of `num_layers` such layers. Raises ConfigError."""
        return KVSpec(
            num_layers,
            self.num_kv_heads,
            self.head_dim,
            dtype=dtype,
            block_size=block_size,
            value_dim=self.value_dim,
            is_latent=self.latent is not None,
        )


class PagedLayer:
    """One layer's share of the storage, and the call of the op with the layer's own options."""

    __slots__ = ("_k_cache", "_k_scale", "_key_up", "_shape", "_v_cache", "_v_scale", "_value_up", "_window", "step")

    def __init__(self, shape: LayerShape, storage: KVStorage, layer_idx: int) -> None:
        self._shape = shape
        self._k_cache = storage.key_cache(layer_idx)
        self._v_cache = storage.value_cache(layer_idx)
        self._k_scale = storage.k_scale(layer_idx)
        self._v_scale = storage.v_scale(layer_idx)
        # A "sliding window of W" holds the query itself: W - 1 keys before it.
        self._window = None if shape.window is None else (shape.window - 1, 0)
        self.step: StepInputs | None = None
        """The step under way; None outside of one."""
        if shape.latent is not None:
            self._key_up, self._value_up = _absorbed(shape)

    def attend(self, step: StepInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a packed step, as transformers hands it to an attention function.

        query: (1, q_heads, tokens, head_dim); key, value: (1, kv_heads, tokens, ...); for a latent layer the latent and
        its rotary key. Returns (1, tokens, q_heads, value_dim).
        """
        if self._shape.latent is not None:
            return self._attend_latent(step, query, key, value)
        write_kv(
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._k_cache,
            self._v_cache,
            step.slot_mapping,
            k_scale=self._k_scale,
            v_scale=self._v_scale,
            check_slots=False,
        )
        return self._attention(step, query[0].transpose(0, 1))[None]

    def _attend_latent(self, step: StepInputs, query: Tensor, latent: Tensor, rotary: Tensor) -> Tensor:
        """Absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): heads meet in the space of the latent."""
        keys = torch.cat((latent[0], rotary[0]), dim=-1).transpose(0, 1)
        write_kv(keys, None, self._k_cache, None, step.slot_mapping, k_scale=self._k_scale, check_slots=False)
        nope_dim = self._key_up.shape[1]
        in_latent = torch.bmm(query[0, :, :, :nope_dim], self._key_up)
        queries = torch.cat((in_latent, query[0, :, :, nope_dim:]), dim=-1).transpose(0, 1)
        out = self._attention(step, queries)
        return torch.bmm(out.transpose(0, 1), self._value_up).transpose(0, 1)[None]

    def _attention(self, step: StepInputs, query: Tensor) -> Tensor:
        shape = self._shape
        return paged_attention(
            query,
            self._k_cache,
            self._v_cache,
            step.block_tables,
            step.seq_lens,
            step.query_start_loc,
            scale=shape.scale,
            window=self._window,
            softcap=shape.softcap,
            sinks=shape.sinks,
            alibi_slopes=shape.alibi_slopes,
            k_scale=self._k_scale,
            v_scale=self._v_scale,
            plan=step.plan_for(
                shape.num_q_heads, shape.num_kv_heads, self._window, may_share=shape.alibi_slopes is None
            ),
        )


def _absorbed(shape: LayerShape) -> tuple[Tensor, Tensor]:
    """The up-projections of keys (heads, nope_dim, latent_dim) and values (heads, latent_dim, value_dim), by head."""
    latent = shape.latent
    if latent is None:
        raise TypeError("only a latent layer has up-projections")
    module: Any = shape.module
    weight = module.kv_b_proj.weight.detach()
    by_head = weight.view(shape.num_q_heads, latent.nope_dim + latent.value_dim, latent.latent_dim)
    keys, values = by_head.split((latent.nope_dim, latent.value_dim), dim=1)
    return keys, values.transpose(1, 2)
