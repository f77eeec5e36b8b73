import dataclasses

import pytest

from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.simulations.cost_models import DEVICES, get_device


@pytest.mark.parametrize(
    ("name", "gib", "gb_per_s", "tflops", "host_gb_per_s", "link_gb_per_s"),
    [
        ("RTX-4090", 24, 1008, 165.2, 32, 32),
        ("A100-80G", 80, 2039, 312, 32, 300),
        ("H100", 80, 3350, 989.4, 64, 450),
        ("H200", 141, 4800, 989.4, 64, 450),
    ],
)
def test_presets_carry_the_data_sheets_dense_one_direction_numbers(
    name: str, gib: int, gb_per_s: float, tflops: float, host_gb_per_s: float, link_gb_per_s: float
) -> None:
    device = get_device(name)
    assert device.memory_bytes == gib * 2**30
    assert device.memory_bytes_per_s == gb_per_s * 1e9
    assert device.flops_per_s == tflops * 1e12
    assert device.host_link_bytes_per_s == host_gb_per_s * 1e9
    assert device.device_link_bytes_per_s == link_gb_per_s * 1e9


def test_lookup_ignores_case() -> None:
    assert get_device("rtx-4090") is DEVICES["RTX-4090"]


def test_an_unknown_device_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidArgumentError, match="'H10'; known: RTX-4090, A100-80G, H100, H200"):
        get_device("H10")


def test_every_preset_names_its_source() -> None:
    assert all("NVIDIA" in device.source for device in DEVICES.values())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "fast"])
@pytest.mark.parametrize(
    "field", ["memory_bytes_per_s", "flops_per_s", "host_link_bytes_per_s", "device_link_bytes_per_s"]
)
def test_a_rate_that_is_not_finite_and_positive_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be a finite number above 0"):
        dataclasses.replace(get_device("H100"), **{field: value})


@pytest.mark.parametrize("value", [0, -1, 80e9])
def test_memory_bytes_must_be_a_positive_integer(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^memory_bytes must be"):
        dataclasses.replace(get_device("H100"), memory_bytes=value)
