"""The shape of a decoder-only transformer, and what follows from it: parameters, weight bytes, K/V bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models.checks import require_bits, require_non_negative_int, require_positive_int

__all__ = ["LatentAttention", "MixtureOfExperts", "ModelSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA): K and V of all heads are cached as one latent vector and one RoPE key.

    The query is projected in one piece (no `q_lora_rank`), as in DeepSeek-V2-Lite.
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            require_positive_int(field.name, getattr(self, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Layers whose MLP is a set of routed experts, of which each token takes a few, and shared experts for all.

    num_dense_layers: the first layers, which keep a dense MLP of `ModelSpec.intermediate_size`
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.2.
    """

    num_routed_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    expert_intermediate_size: int
    num_dense_layers: int

    def __post_init__(self) -> None:
        for name in ("num_routed_experts", "num_experts_per_token", "expert_intermediate_size"):
            require_positive_int(name, getattr(self, name))
        for name in ("num_shared_experts", "num_dense_layers"):
            require_non_negative_int(name, getattr(self, name))
        if self.num_experts_per_token > self.num_routed_experts:
            raise ConfigError(
                f"num_experts_per_token ({self.num_experts_per_token}) exceeds num_routed_experts"
                f" ({self.num_routed_experts})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer with RMSNorm and gated MLPs (gate, up, down), by the names of its config.json.

    num_layers, hidden_size, intermediate_size, vocab_size, max_position_embeddings: as there
    num_q_heads, num_kv_heads, head_dim: of attention; with `latent_attention` the head sizes come from it instead
    has_tied_embeddings: the LM head is the embedding table
    has_qkv_bias:        the projections to Q, K and V have a bias (Qwen2)
    source:              where the numbers come from

    Attention is taken as full: a sliding window would read less. Raises `ConfigError` for sizes below 1, query heads
    that are no multiple of the KV heads, and more dense layers than layers.
    """

    name: str
    source: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    mixture_of_experts: MixtureOfExperts | None = None
    latent_attention: LatentAttention | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            require_positive_int(name, getattr(self, name))
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads ({self.num_q_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.mixture_of_experts is not None and self.mixture_of_experts.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"num_dense_layers ({self.mixture_of_experts.num_dense_layers}) exceeds num_layers ({self.num_layers})"
            )

    @property
    def embedding_parameters(self) -> int:
        """Entries of the embedding table, and just as many of the LM head: vocab_size * hidden_size."""
        return self.vocab_size * self.hidden_size

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        moe = self.mixture_of_experts
        return 0 if moe is None else self.num_layers - moe.num_dense_layers

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert in one layer: 3 * hidden_size * expert_intermediate_size; 0 without experts."""
        moe = self.mixture_of_experts
        return 0 if moe is None else 3 * self.hidden_size * moe.expert_intermediate_size

    @property
    def attention_parameters_per_layer(self) -> int:
        """Matrix weights of attention in one layer: Q, K, V and output; with MLA the down- and up-projections."""
        latent = self.latent_attention
        if latent is None:
            return 2 * self.hidden_size * self.head_dim * (self.num_q_heads + self.num_kv_heads)
        query = self.hidden_size * self.num_q_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        down = self.hidden_size * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        up = latent.kv_lora_rank * self.num_q_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return query + down + up + self.num_q_heads * latent.v_head_dim * self.hidden_size

    @property
    def shared_matrix_parameters(self) -> int:
        """Matrix weights of all layers that every token passes: attention, dense MLPs, routers, shared experts."""
        total = self.num_layers * self.attention_parameters_per_layer
        total += (self.num_layers - self.num_moe_layers) * 3 * self.hidden_size * self.intermediate_size
        moe = self.mixture_of_experts
        if moe is not None:
            router = self.hidden_size * moe.num_routed_experts
            total += self.num_moe_layers * (router + moe.num_shared_experts * self.expert_parameters)
        return total

    @property
    def vector_parameters(self) -> int:
        """Norm weights and biases: read in each step, never multiplied as a matrix."""
        per_layer = 2 * self.hidden_size
        if self.latent_attention is not None:
            per_layer += self.latent_attention.kv_lora_rank
        if self.has_qkv_bias:
            per_layer += self.head_dim * (self.num_q_heads + 2 * self.num_kv_heads)
        return self.num_layers * per_layer + self.hidden_size

    @property
    def matmul_parameters_per_token(self) -> int:
        """Matrix weights that one token is multiplied with, all layers, without the LM head."""
        moe = self.mixture_of_experts
        routed = 0 if moe is None else moe.num_experts_per_token * self.expert_parameters
        return self.shared_matrix_parameters + self.num_moe_layers * routed

    @property
    def num_active_parameters(self) -> int:
        """Parameters read for one token, LM head included; of the embedding table only one row, which is left out."""
        return self.matmul_parameters_per_token + self.vector_parameters + self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding table counted once."""
        moe = self.mixture_of_experts
        routed = 0 if moe is None else self.num_moe_layers * moe.num_routed_experts * self.expert_parameters
        tables = self.embedding_parameters * (1 if self.has_tied_embeddings else 2)
        return self.shared_matrix_parameters + self.vector_parameters + routed + tables

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of all layers for one query-key pair: 2 per multiply-add, for the score and for the weighted sum.

        4 * num_q_heads * head_dim * num_layers. MLA is counted in its expanded form, as prefill computes it; the
        absorbed form, which decoding uses, needs more FLOPs, but decoding is bound by memory in either form.
        """
        latent = self.latent_attention
        if latent is None:
            return 4 * self.num_q_heads * self.head_dim * self.num_layers
        dims = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
        return 2 * self.num_q_heads * dims * self.num_layers

    def weight_bytes(self, bits: int) -> int:
        """Bytes of all weights at `bits` (4, 8, 16 or 32) each; scales of quantised weights are left out."""
        require_bits("bits", bits)
        return self.num_parameters * bits // 8

    def kv_bytes_per_token(self, bits: int, *, num_devices: int = 1) -> int:
        """Bytes of the K/V of one token, all layers, that *each* of `num_devices` tensor-parallel devices holds.

        2 * num_layers * num_kv_heads * head_dim * bits / 8, the heads divided among the devices; each device has at
        least one head, and a copy of MLA's latent vector (num_layers * (kv_lora_rank + qk_rope_head_dim) elements),
        which no head owns.
        """
        require_bits("bits", bits)
        self.require_divisible_among(num_devices)
        latent = self.latent_attention
        if latent is not None:
            return self.num_layers * (latent.kv_lora_rank + latent.qk_rope_head_dim) * bits // 8
        num_kv_heads = max(1, self.num_kv_heads // num_devices)
        return 2 * self.num_layers * num_kv_heads * self.head_dim * bits // 8

    def require_divisible_among(self, num_devices: int) -> None:
        """Raise `ConfigError` unless each of `num_devices` gets as many whole heads as any other."""
        require_positive_int("num_devices", num_devices)
        has_whole_kv_heads = (
            self.latent_attention is not None
            or self.num_kv_heads % num_devices == 0
            or num_devices % self.num_kv_heads == 0
        )
        if self.num_q_heads % num_devices or not has_whole_kv_heads:
            raise ConfigError(
                f"{self.name} has {self.num_q_heads} query and {self.num_kv_heads} KV heads, which num_devices"
                f" ({num_devices}) does not divide evenly"
            )
