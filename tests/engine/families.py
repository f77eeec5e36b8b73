"""Tiny models of many families, with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 160

# 2 layers, hidden 64, heads of 16, unless a family has its own shape. Windows are short, so that tests run beyond them.
_PLAIN = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WITHOUT_HEAD_DIM = {key: value for key, value in _PLAIN.items() if key != "head_dim"}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _PLAIN),
    "qwen2": ("Qwen2", _WITHOUT_HEAD_DIM),
    "qwen3": ("Qwen3", _PLAIN),
    "mistral": ("Mistral", _PLAIN | {"sliding_window": 12}),
    "mixtral": ("Mixtral", _PLAIN | _EXPERTS),
    "phi3": ("Phi3", _WITHOUT_HEAD_DIM),
    "olmo2": ("Olmo2", _WITHOUT_HEAD_DIM),
    "gemma2": (
        "Gemma2",
        _PLAIN | {"sliding_window": 12, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3",
        _PLAIN
        | {"sliding_window": 12, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (
        "GptOss",
        _PLAIN | _EXPERTS | {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {key: value for key, value in _PLAIN.items() if key not in ("head_dim", "num_key_value_heads")}
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {key: value for key, value in _WITHOUT_HEAD_DIM.items() if key != "num_key_value_heads"},
    ),
    "bloom": (
        "Bloom",
        {
            "n_layer": 2,
            "hidden_size": 64,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def make_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode whose next tokens depend on the whole text: its weights are larger than at a usual start."""
    name, config = _FAMILIES[family]
    class_name = "Gemma3ForCausalLM" if name == "Gemma3" else f"{name}ForCausalLM"
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    make_config: Callable[..., Any] = getattr(transformers, config_name)
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(make_config(**(config | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 or "sinks" in name or "bias" in name:
                weight.normal_(0.0, 0.35 if weight.ndim >= 2 else 0.1, generator=generator)
    return model.eval()
