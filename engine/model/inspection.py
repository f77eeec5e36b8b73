"""What a model's attention layers are, seen by running it once on two tokens; models that do not fit are refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.engine.errors import UnsupportedModelError
from pagedkv.engine.model.bloom import bloom_shape, is_bloom_attention
from pagedkv.engine.model.layers import LatentShape, LayerShape
from pagedkv.engine.model.patches import Patches, keeps_latent

__all__ = ["inspect_model"]

# What attention functions of transformers are called with and what may be left unread: `dropout` is 0 in evaluation, and
# the others repeat what the step's own tensors say, or ask for outputs that a caller of the engine cannot ask for.
READ_KWARGS = {"scaling", "sliding_window", "softcap", "s_aux"}
IGNORED_KWARGS = {
    "dropout",
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cache_position",
    "position_embeddings",
    "deterministic",
}
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


def inspect_model(model: Any) -> list[LayerShape]:
    """The model's attention layers, in order. Runs it on two tokens with a stand-in for attention.

    Raises UnsupportedModelError for what is no causal language model of plain attention layers: encoder-decoders,
    state-space, linear or chunked attention layers, attention that does not go through transformers' attention
    interface or asks for options that the op does not have.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(name, "it is no causal language model of transformers")
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(name, "it is an encoder-decoder; only decoders have one cache that grows")
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in SERVED_LAYER_TYPES:
            raise UnsupportedModelError(
                name, f"it has layers of type {layer_type!r}, which keep no keys and values in blocks"
            )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(name, "some of its layers share the keys and values of others")
    layers = _probe(model, name)
    num_expected = config.num_hidden_layers
    if len(layers) != num_expected:
        raise UnsupportedModelError(
            name,
            f"{len(layers)} of its {num_expected} layers call transformers' attention interface; the others are of an "
            "unknown kind (state-space, linear or custom attention)",
        )
    first = layers[0]
    for layer in layers[1:]:
        if _cache_shape(layer) != _cache_shape(first):
            raise UnsupportedModelError(
                name,
                f"its layers cache keys and values of different shapes: {_cache_shape(first)} and {_cache_shape(layer)}",
            )
    return layers


def _cache_shape(layer: LayerShape) -> tuple[int, int, int, bool]:
    return layer.num_kv_heads, layer.head_dim, layer.value_dim, layer.latent is not None


def _probe(model: Any, name: str) -> list[LayerShape]:
    layers: list[LayerShape] = []

    def record(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise UnsupportedModelError(name, "it hands its attention a mask of its own")
        layer = _layer_shape(name, module, query, key, value, kwargs)
        layers.append(layer)
        value_dim = layer.latent.value_dim if layer.latent else layer.value_dim
        return query.new_zeros((1, query.shape[2], query.shape[1], value_dim)), None

    device = next(model.parameters()).device
    token_ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device)[None]
    try:
        with Patches(model, record), torch.inference_mode():
            model(input_ids=token_ids, position_ids=positions, use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            name, f"it cannot run without masks of its own ({type(error).__name__}: {error})"
        ) from error
    return layers


def _layer_shape(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> LayerShape:
    unknown = sorted(
        key
        for key, given in kwargs.items()
        if given is not None and key not in READ_KWARGS and key not in IGNORED_KWARGS
    )
    if unknown:
        raise UnsupportedModelError(name, f"it hands its attention {', '.join(unknown)}, which the op does not know")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedModelError(name, "its attention is not causal")
    if is_bloom_attention(module):
        return bloom_shape(module)
    num_q_heads = query.shape[1]
    scale = kwargs.get("scaling")
    window, softcap, sinks = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    latent = None
    head_dim, value_dim = query.shape[3], value.shape[3]
    if keeps_latent(module):
        latent = _latent_shape(name, module, key, value)
        head_dim, value_dim = latent.latent_dim + latent.rope_dim, latent.latent_dim
    return LayerShape(
        module,
        num_q_heads,
        key.shape[1],
        head_dim,
        value_dim,
        scale=1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale),
        window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        sinks=None if sinks is None else sinks.detach().float(),
        latent=latent,
    )


def _latent_shape(name: str, module: Any, latent: Tensor, rotary: Tensor) -> LatentShape:
    weight = getattr(getattr(module, "kv_b_proj", None), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or module.kv_b_proj.bias is not None:
        raise UnsupportedModelError(
            name, "the up-projection of its latent attention is quantised or of an unknown kind"
        )
    shape = LatentShape(module.qk_nope_head_dim, rotary.shape[3], module.v_head_dim, latent.shape[3])
    if weight.shape != (module.num_heads * (shape.nope_dim + shape.value_dim), shape.latent_dim):
        raise UnsupportedModelError(
            name, f"the up-projection of its latent attention has the shape {tuple(weight.shape)}"
        )
    return shape
