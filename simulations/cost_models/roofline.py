"""Step time from a model's shape and a device's data sheet: the slower of computing and reading memory."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from pagedkv.simulations.cost_models.capacity import block_bytes
from pagedkv.simulations.cost_models.checks import require_bits
from pagedkv.simulations.cost_models.devices import DeviceSpec
from pagedkv.simulations.cost_models.efficiency import TYPICAL, Efficiency
from pagedkv.simulations.cost_models.load import Seconds, StepLoad
from pagedkv.simulations.cost_models.models import ModelSpec
from pagedkv.simulations.cost_models.weight_reads import WeightReads

__all__ = ["RooflineCostModel"]

_ACTIVATION_BYTES = 2
_ALL_REDUCES_PER_LAYER = 2


class RooflineCostModel:
    """The roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) of one step on `num_devices` equal devices.

    step_time = max(compute, memory) + all-reduces + block copies + swaps + step overhead, where

    compute     = (2 * matmul_parameters_per_token * num_tokens + 2 * vocab_size * hidden_size * num_sampled
                  + attention_flops_per_pair * num_attention_pairs) / FLOP/s
    memory      = (weights of the layers, once + weights of the LM head, if a row samples
                  + K/V bytes per token * (num_context_tokens read + num_tokens written)) / bytes/s
    all-reduces = 2 per layer (Megatron-LM, arXiv:1909.08053, section 3), as rings: a device sends
                  2 * (num_devices - 1) / num_devices of num_tokens * hidden_size * 2 bytes, plus a fixed latency
    copies      = 2 * bytes of a block / memory bytes/s: read and written
    swaps       = bytes of a block / host link bytes/s, each direction; they hide behind nothing

    Each device holds `1 / num_devices` of the weights, of the FLOPs and of the K/V heads (see
    `ModelSpec.kv_bytes_per_token` for what is not divided), and has its own host link. FLOPs are 16-bit ones
    whatever the weights: quantised weights are expanded before they are multiplied. Of the experts, those are
    read that the tokens are expected to touch (`expected_num_experts`). Left out, being small next to the rest:
    activations, rows of the embedding table, gathering of logits, sampling.

    `efficiency` says how much of the peak numbers is reached: `TYPICAL`, or `IDEAL` for the pure roofline.
    Seven parameters, one more than is our habit: they are what a deployment consists of.

    Raises `ConfigError` for widths other than 4, 8, 16 or 32 bits, and heads that the devices cannot share.
    Whether the weights fit is `num_kv_blocks`' question.
    """

    __slots__ = (
        "_all_reduce_s_per_token",
        "_attention_s_per_pair",
        "_copy_s_per_block",
        "_description",
        "_fixed_s",
        "_head_read_s",
        "_head_s_per_row",
        "_kv_s_per_token",
        "_matmul_s_per_token",
        "_name",
        "_swap_s_per_block",
        "_weight_reads",
    )

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        *,
        block_size: int,
        num_devices: int = 1,
        weight_bits: int = 16,
        kv_bits: int = 16,
        efficiency: Efficiency = TYPICAL,
    ) -> None:
        require_bits("weight_bits", weight_bits)
        bytes_per_block = block_bytes(model, block_size, kv_bits, num_devices=num_devices)
        flops_per_s = device.flops_per_s * efficiency.compute
        bytes_per_s = device.memory_bytes_per_s * efficiency.memory
        weight_s = weight_bits / 8 / num_devices / bytes_per_s

        self._matmul_s_per_token = 2 * model.matmul_parameters_per_token / num_devices / flops_per_s
        self._head_s_per_row = 2 * model.embedding_parameters / num_devices / flops_per_s
        self._attention_s_per_pair = model.attention_flops_per_pair / num_devices / flops_per_s

        self._weight_reads = WeightReads(
            (model.shared_matrix_parameters + model.vector_parameters) * weight_s,
            experts_s=model.num_moe_layers * model.expert_parameters * weight_s,
            mixture_of_experts=model.mixture_of_experts,
        )
        self._head_read_s = model.embedding_parameters * weight_s
        self._kv_s_per_token = model.kv_bytes_per_token(kv_bits, num_devices=num_devices) / bytes_per_s

        self._fixed_s = efficiency.step_overhead_s
        self._all_reduce_s_per_token = 0.0
        if num_devices > 1:
            num_all_reduces = _ALL_REDUCES_PER_LAYER * model.num_layers
            message_bytes = model.hidden_size * _ACTIVATION_BYTES
            sent_bytes = num_all_reduces * 2 * (num_devices - 1) * message_bytes / num_devices
            self._all_reduce_s_per_token = sent_bytes / (device.device_link_bytes_per_s * efficiency.device_link)
            self._fixed_s += num_all_reduces * efficiency.all_reduce_latency_s
        self._copy_s_per_block = 2 * bytes_per_block / bytes_per_s
        self._swap_s_per_block = bytes_per_block / (device.host_link_bytes_per_s * efficiency.host_link)

        self._name = f"roofline({model.name}, {num_devices} x {device.name})"
        self._description: dict[str, Any] = {
            "kind": "roofline",
            "name": self._name,
            "model": asdict(model),
            "device": asdict(device),
            "block_size": block_size,
            "block_bytes": bytes_per_block,
            "num_devices": num_devices,
            "weight_bits": weight_bits,
            "kv_bits": kv_bits,
            "efficiency": asdict(efficiency),
        }

    @property
    def name(self) -> str:
        """The model and the devices, for instance "roofline(Llama-3-8B, 1 x H100)"."""
        return self._name

    @property
    def prefill_s_per_token(self) -> float:
        """Marginal seconds of one more prompt token in a compute-bound step: its matrix products and all-reduces.

        Attention to the earlier tokens is left out, as it depends on how many there are: it costs as much as the
        matrix products at 2 * matmul_parameters_per_token / attention_flops_per_pair tokens (26,624 for Llama-3-8B).
        """
        return self._matmul_s_per_token + self._all_reduce_s_per_token

    @property
    def swap_s_per_block(self) -> float:
        """Seconds to move one block over the host link in one direction, all devices at once."""
        return self._swap_s_per_block

    def step_time(self, load: StepLoad) -> Seconds:
        """Seconds for the step; see the class for the formula. O(1), or O(k) for k steps."""
        _, num_tokens, num_sampled, num_context_tokens, num_pairs, num_copied, num_in, num_out = load
        compute_s = (
            num_tokens * self._matmul_s_per_token
            + num_sampled * self._head_s_per_row
            + num_pairs * self._attention_s_per_pair
        )
        memory_s = (
            self._weight_reads.time(num_tokens)
            + (num_sampled > 0) * self._head_read_s
            + (num_context_tokens + num_tokens) * self._kv_s_per_token
        )
        if isinstance(compute_s, float) and isinstance(memory_s, float):
            roofline_s: Seconds = max(compute_s, memory_s)
        else:
            roofline_s = np.maximum(compute_s, memory_s)
        return cast(
            "Seconds",
            roofline_s
            + num_tokens * self._all_reduce_s_per_token
            + num_copied * self._copy_s_per_block
            + (num_in + num_out) * self._swap_s_per_block
            + self._fixed_s,
        )

    def describe(self) -> dict[str, Any]:
        """The model, device, widths and efficiencies, with their sources."""
        return copy.deepcopy(self._description)
