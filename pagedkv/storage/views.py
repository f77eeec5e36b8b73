"""Where a layer's tensors lie within the blocks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pagedkv.kv_spec import KVPart, KVSpec

__all__ = ["LayerViews", "Layout", "layer_views"]

Layout = Literal["NHD", "HND"]


class LayerViews(NamedTuple):
    """Views of one layer's tensors, as attention takes them. A latent's `value` is a view of its `key`."""

    key: Tensor
    value: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def layer_views(buffer: Tensor, spec: KVSpec, layout: Layout) -> tuple[LayerViews, ...]:
    """Every layer's tensors within `buffer`, (num_blocks, spec.bytes_per_block) uint8. O(num_layers)."""
    parts = {part.name: part for part in spec.parts}
    return tuple(_views_of_layer(buffer, spec, layout, parts, layer) for layer in range(spec.num_layers))


def _views_of_layer(buffer: Tensor, spec: KVSpec, layout: Layout, parts: dict[str, KVPart], layer: int) -> LayerViews:
    dtype = torch.uint8 if spec.dtype == "int4" else getattr(torch, spec.dtype)
    scale_dtype = torch.float32 if spec.dtype == "int8" else torch.bfloat16
    views: dict[str, Tensor] = {}
    for name, part in parts.items():
        is_scale = name.endswith("scale")
        view = _view(buffer, spec, layout, part, layer, scale_dtype if is_scale else dtype)
        if is_scale:
            view = view.squeeze(-1) if spec.dtype == "int8" else view.view(*view.shape[:-1], -1, 2)
        views[name] = view
    if spec.is_latent:
        head_dim, value_dim = spec.dims
        views["value"] = views["key"][..., : views["key"].shape[-1] * value_dim // head_dim]
        if "k_scale" in views:
            scale = views["k_scale"]
            views["v_scale"] = (
                scale if spec.dtype == "int8" else scale[..., : scale.shape[-2] * value_dim // head_dim, :]
            )
    return LayerViews(views["key"], views["value"], views.get("k_scale"), views.get("v_scale"))


def _view(buffer: Tensor, spec: KVSpec, layout: Layout, part: KVPart, layer: int, dtype: torch.dtype) -> Tensor:
    """(num_blocks, block_size, num_kv_heads, elements); HND differs by its strides alone."""
    elements = buffer.view(dtype)
    width = part.bytes_per_head // dtype.itemsize
    heads, block_size = spec.num_kv_heads, spec.block_size
    strides = (heads * width, width) if layout == "NHD" else (width, block_size * width)
    return elements.as_strided(
        (buffer.shape[0], block_size, heads, width),
        (elements.stride(0), *strides, 1),
        # Counted from the start of the memory, not of the buffer, which may be a slice of it.
        elements.storage_offset() + (layer * spec.bytes_per_layer + part.offset) // dtype.itemsize,
    )
