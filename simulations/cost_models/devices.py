"""Accelerators, as their data sheets describe them."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.cost_models.checks import require_positive, require_positive_int

__all__ = ["DEVICES", "DeviceSpec", "get_device"]

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device. Peak numbers; `Efficiency` says how much of them is reached.

    memory_bytes:           installed memory. Data sheets print "80 GB" for 80 * 2**30 bytes
    memory_bytes_per_s:     peak memory bandwidth
    flops_per_s:            peak *dense* FLOP/s of fp16 and bf16 matrix products with fp32 accumulation. Data
                            sheets print twice this ("with sparsity") for Hopper
    host_link_bytes_per_s:  to host memory, in one direction
    device_link_bytes_per_s: to the other devices of the node, in one direction. Data sheets print both directions
    source:                 where the numbers come from

    Raises `ConfigError` for numbers that are not finite and above 0.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    host_link_bytes_per_s: float
    device_link_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        require_positive_int("memory_bytes", self.memory_bytes)
        for field in ("memory_bytes_per_s", "flops_per_s", "host_link_bytes_per_s", "device_link_bytes_per_s"):
            require_positive(field, getattr(self, field))


_RTX_4090 = DeviceSpec(
    name="RTX-4090",
    memory_bytes=24 * _GIB,
    memory_bytes_per_s=1_008e9,
    flops_per_s=165.2e12,
    host_link_bytes_per_s=32e9,
    device_link_bytes_per_s=32e9,
    source=(
        "NVIDIA Ada GPU Architecture white paper v2, appendix A: 24 GB GDDR6X, 1008 GB/s, 165.2 TFLOPS fp16 with fp32"
        " accumulation (330.4 with sparsity), PCIe Gen 4 x16; it has no NVLink, so devices talk over PCIe"
    ),
)
_A100_80G = DeviceSpec(
    name="A100-80G",
    memory_bytes=80 * _GIB,
    memory_bytes_per_s=2_039e9,
    flops_per_s=312e12,
    host_link_bytes_per_s=32e9,
    device_link_bytes_per_s=300e9,
    source=(
        "NVIDIA A100 data sheet, A100 80GB SXM: 2,039 GB/s, 312 TFLOPS bf16 (624 with sparsity), NVLink 600 GB/s and"
        " PCIe Gen 4 64 GB/s, both counting two directions"
    ),
)
_H100 = DeviceSpec(
    name="H100",
    memory_bytes=80 * _GIB,
    memory_bytes_per_s=3_350e9,
    flops_per_s=989.4e12,
    host_link_bytes_per_s=64e9,
    device_link_bytes_per_s=450e9,
    source=(
        "NVIDIA H100 data sheet, H100 SXM: 3.35 TB/s, 1,979 TFLOPS bf16 with sparsity (989.4 dense: H100 architecture"
        " white paper, table 2), NVLink 900 GB/s and PCIe Gen 5 128 GB/s, both counting two directions"
    ),
)
_H200 = DeviceSpec(
    name="H200",
    memory_bytes=141 * _GIB,
    memory_bytes_per_s=4_800e9,
    flops_per_s=989.4e12,
    host_link_bytes_per_s=64e9,
    device_link_bytes_per_s=450e9,
    source=(
        "NVIDIA H200 data sheet, H200 SXM: 141 GB, 4.8 TB/s, 1,979 TFLOPS bf16 with sparsity (the H100's GPU, so 989.4"
        " dense), NVLink 900 GB/s and PCIe Gen 5 128 GB/s, both counting two directions"
    ),
)

DEVICES: dict[str, DeviceSpec] = {device.name: device for device in (_RTX_4090, _A100_80G, _H100, _H200)}
"""The presets, by name."""


def get_device(name: str) -> DeviceSpec:
    """The preset of that name, upper and lower case alike. Raises `InvalidArgumentError` with the known names.

    >>> get_device("h100").memory_bytes_per_s
    3350000000000.0
    """
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    raise InvalidArgumentError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
