"""Published models, with the numbers of their config.json."""

from __future__ import annotations

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.cost_models.models import LatentAttention, MixtureOfExperts, ModelSpec

__all__ = ["MODELS", "get_model"]

_LLAMA_2_7B = ModelSpec(
    name="Llama-2-7B",
    source="config.json of meta-llama/Llama-2-7b-hf on the Hugging Face Hub; arXiv:2307.09288",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_q_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
)
_LLAMA_3_8B = ModelSpec(
    name="Llama-3-8B",
    source="config.json of meta-llama/Meta-Llama-3-8B on the Hugging Face Hub; arXiv:2407.21783, table 3",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
_LLAMA_3_70B = ModelSpec(
    name="Llama-3-70B",
    source="config.json of meta-llama/Meta-Llama-3-70B on the Hugging Face Hub; arXiv:2407.21783, table 3",
    num_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_q_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
# v0.3, not v0.1: it has no sliding window, so full attention is what it computes.
_MISTRAL_7B = ModelSpec(
    name="Mistral-7B",
    source="config.json of mistralai/Mistral-7B-v0.3 on the Hugging Face Hub (sliding_window: null)",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32768,
    max_position_embeddings=32768,
)
_QWEN_2_5_7B = ModelSpec(
    name="Qwen2.5-7B",
    source="config.json of Qwen/Qwen2.5-7B on the Hugging Face Hub (use_sliding_window: false); arXiv:2412.15115",
    num_layers=28,
    hidden_size=3584,
    intermediate_size=18944,
    num_q_heads=28,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=152064,
    max_position_embeddings=131072,
    has_qkv_bias=True,
)
_DEEPSEEK_V2_LITE = ModelSpec(
    name="DeepSeek-V2-Lite",
    source="config.json of deepseek-ai/DeepSeek-V2-Lite on the Hugging Face Hub; arXiv:2405.04434, appendix B",
    num_layers=27,
    hidden_size=2048,
    intermediate_size=10944,
    num_q_heads=16,
    num_kv_heads=16,
    head_dim=128,
    vocab_size=102400,
    max_position_embeddings=163840,
    mixture_of_experts=MixtureOfExperts(
        num_routed_experts=64,
        num_experts_per_token=6,
        num_shared_experts=2,
        expert_intermediate_size=1408,
        num_dense_layers=1,
    ),
    latent_attention=LatentAttention(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)

MODELS: dict[str, ModelSpec] = {
    model.name: model
    for model in (_LLAMA_2_7B, _LLAMA_3_8B, _LLAMA_3_70B, _MISTRAL_7B, _QWEN_2_5_7B, _DEEPSEEK_V2_LITE)
}
"""The presets, by name."""


def get_model(name: str) -> ModelSpec:
    """The preset of that name, upper and lower case alike. Raises `InvalidArgumentError` with the known names.

    >>> get_model("llama-3-8b").num_parameters
    8030261248
    """
    for model in MODELS.values():
        if model.name.lower() == name.lower():
            return model
    raise InvalidArgumentError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
