"""How many K/V blocks fit beside the weights."""

from __future__ import annotations

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models.checks import (
    require_bits,
    require_fraction,
    require_non_negative_int,
    require_positive_int,
)
from pagedkv.simulations.cost_models.devices import DeviceSpec
from pagedkv.simulations.cost_models.models import ModelSpec

__all__ = ["block_bytes", "num_kv_blocks"]

_GIB = 2**30


def block_bytes(model: ModelSpec, block_size: int, kv_bits: int = 16, *, num_devices: int = 1) -> int:
    """Bytes of one block of `block_size` tokens, all layers, on *each* of `num_devices` tensor-parallel devices.

    Raises `ConfigError` for sizes below 1, unknown widths, and heads that the devices cannot share.
    """
    require_positive_int("block_size", block_size)
    require_bits("kv_bits", kv_bits)
    return block_size * model.kv_bytes_per_token(kv_bits, num_devices=num_devices)


def num_kv_blocks(
    model: ModelSpec,
    device: DeviceSpec,
    *,
    block_size: int,
    num_devices: int = 1,
    weight_bits: int = 16,
    kv_bits: int = 16,
    memory_fraction: float = 0.9,
    activation_bytes: int = _GIB,
) -> int:
    """Blocks of K/V that fit on each device beside its share of the weights.

    (memory_bytes * memory_fraction - weight bytes / num_devices - activation_bytes) // block bytes

    memory_fraction:  of the installed memory, what the engine may use; the rest is for the driver and fragmentation
    activation_bytes: kept on each device for activations and workspaces. 1 GiB, an assumption: a step of 8,192
                      tokens of an 8B model needs about half of it

    Raises `ConfigError`, with the arithmetic, if not even one block fits.
    """
    require_fraction("memory_fraction", memory_fraction)
    require_non_negative_int("activation_bytes", activation_bytes)
    require_bits("weight_bits", weight_bits)
    bytes_per_block = block_bytes(model, block_size, kv_bits, num_devices=num_devices)

    usable_bytes = int(device.memory_bytes * memory_fraction)
    weight_bytes = model.weight_bytes(weight_bits) // num_devices
    left_bytes = usable_bytes - weight_bytes - activation_bytes
    if left_bytes < bytes_per_block:
        raise ConfigError(
            f"{model.name} does not fit on {num_devices} x {device.name}: each has {_gib(usable_bytes)} usable"
            f" ({memory_fraction:g} of {_gib(device.memory_bytes)}), less {_gib(weight_bytes)} of {weight_bits}-bit"
            f" weights and {_gib(activation_bytes)} for activations leaves {_gib(left_bytes)},"
            f" and one block takes {bytes_per_block:,} bytes"
        )
    return left_bytes // bytes_per_block


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
