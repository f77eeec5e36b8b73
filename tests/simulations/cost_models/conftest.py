import pytest

from pagedkv.simulations.cost_models import DeviceSpec, ModelSpec


@pytest.fixture
def tiny_model() -> ModelSpec:
    """30 matrix weights, 6 norm weights, two tables of 10; 8 FLOPs per query-key pair; 2 K/V elements per token."""
    return ModelSpec(
        name="tiny",
        source="made up",
        num_layers=1,
        hidden_size=2,
        intermediate_size=3,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=5,
        max_position_embeddings=64,
    )


@pytest.fixture
def tiny_device() -> DeviceSpec:
    """Powers of two, so that every expected time is exact."""
    return DeviceSpec(
        name="slate",
        source="made up",
        memory_bytes=1024,
        memory_bytes_per_s=4.0,
        flops_per_s=16.0,
        host_link_bytes_per_s=2.0,
        device_link_bytes_per_s=2.0,
    )
