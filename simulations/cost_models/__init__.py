"""Cost models: how long a step takes, and how many blocks a device holds."""

from pagedkv.simulations.cost_models.capacity import block_bytes, num_kv_blocks
from pagedkv.simulations.cost_models.devices import DEVICES, DeviceSpec, get_device
from pagedkv.simulations.cost_models.efficiency import IDEAL, TYPICAL, Efficiency
from pagedkv.simulations.cost_models.fitted import load_cost_model, save_cost_model
from pagedkv.simulations.cost_models.fitting import StepFit, fit_steps
from pagedkv.simulations.cost_models.linear import LinearCostModel
from pagedkv.simulations.cost_models.load import Count, Seconds, StepLoad
from pagedkv.simulations.cost_models.model_presets import MODELS, get_model
from pagedkv.simulations.cost_models.models import LatentAttention, MixtureOfExperts, ModelSpec
from pagedkv.simulations.cost_models.protocol import CostModel, TransferCosts
from pagedkv.simulations.cost_models.roofline import RooflineCostModel

__all__ = [
    "CostModel",
    "TransferCosts",
    "StepLoad",
    "Count",
    "Seconds",
    "LinearCostModel",
    "RooflineCostModel",
    "StepFit",
    "fit_steps",
    "load_cost_model",
    "save_cost_model",
    "Efficiency",
    "TYPICAL",
    "IDEAL",
    "ModelSpec",
    "MixtureOfExperts",
    "LatentAttention",
    "MODELS",
    "get_model",
    "DeviceSpec",
    "DEVICES",
    "get_device",
    "block_bytes",
    "num_kv_blocks",
]
