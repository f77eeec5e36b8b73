import pytest

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models import block_bytes, get_device, get_model, num_kv_blocks


def test_a_block_of_16_tokens_of_mistral_7b_takes_2_mib() -> None:
    assert block_bytes(get_model("Mistral-7B"), 16) == 2 * 2**20


def test_a_block_is_shared_out_among_devices() -> None:
    assert block_bytes(get_model("Llama-3-70B"), 16, 8, num_devices=4) == 16 * 40_960


@pytest.mark.parametrize(
    ("model", "device", "num_devices", "num_blocks"),
    [
        # 0.9 * 80 GiB = 77_309_411_328, less 16_060_522_496 of weights and 1 GiB, over 2_097_152
        ("Llama-3-8B", "H100", 1, 28_693),
        # 0.9 * 24 GiB = 23_192_823_398, less 16_060_522_496 of weights and 1 GiB, over 2_097_152
        ("Llama-3-8B", "RTX-4090", 1, 2_888),
        # 77_309_411_328, less 141_107_412_992 / 4 of weights and 1 GiB, over 1_310_720
        ("Llama-3-70B", "H100", 4, 31_249),
    ],
)
def test_blocks_fill_what_weights_and_activations_leave(
    model: str, device: str, num_devices: int, num_blocks: int
) -> None:
    assert num_kv_blocks(get_model(model), get_device(device), block_size=16, num_devices=num_devices) == num_blocks


def test_the_tiny_model_leaves_room_for_98_blocks(tiny_model, tiny_device) -> None:
    # 1024 * 0.9 = 921, less 56 * 2 bytes of weights and 25 of activations, leaves 784; a block takes 2 * 4 bytes.
    blocks = num_kv_blocks(tiny_model, tiny_device, block_size=2, activation_bytes=25)
    assert blocks == 98


def test_exactly_one_block_still_fits_and_one_byte_less_does_not(tiny_model, tiny_device) -> None:
    options = {"block_size": 2, "memory_fraction": 1.0}
    assert num_kv_blocks(tiny_model, tiny_device, activation_bytes=1024 - 112 - 8, **options) == 1
    with pytest.raises(ConfigError, match="one block takes 8 bytes"):
        num_kv_blocks(tiny_model, tiny_device, activation_bytes=1024 - 112 - 7, **options)


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"Llama-3-70B does not fit on 1 x H100: each has 72\.00 GiB usable \(0\.9 of 80\.00 GiB\), less 131\.42 GiB"
            r" of 16-bit weights and 1\.00 GiB for activations leaves -60\.42 GiB, and one block takes 5,242,880 bytes"
        ),
    ):
        num_kv_blocks(get_model("Llama-3-70B"), get_device("H100"), block_size=16)


def test_narrower_weights_make_a_model_fit() -> None:
    assert num_kv_blocks(get_model("Llama-3-70B"), get_device("H100"), block_size=16, weight_bits=4) == 7_812


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"block_size": 16, "num_devices": -1}, "num_devices must be an integer of at least 1, got -1"),
        ({"block_size": 16, "weight_bits": 3}, "weight_bits must be one of 4, 8, 16, 32, got 3"),
        ({"block_size": 16, "kv_bits": 0}, "kv_bits must be one of 4, 8, 16, 32, got 0"),
        ({"block_size": 16, "memory_fraction": 1.1}, "memory_fraction must be above 0 and at most 1, got 1.1"),
        ({"block_size": 16, "memory_fraction": float("nan")}, "memory_fraction must be above 0 and at most 1, got nan"),
        ({"block_size": 16, "activation_bytes": -1}, "activation_bytes must be an integer of at least 0, got -1"),
        ({"block_size": 16, "num_devices": 3}, "Llama-3-8B has 32 query and 8 KV heads, which num_devices"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks(get_model("Llama-3-8B"), get_device("H100"), **options)
    assert str(caught.value).startswith(message)
