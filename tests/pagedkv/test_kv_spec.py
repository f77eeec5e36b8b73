"""Bytes of K/V: our arithmetic against figures that others have published."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pagedkv import ConfigError, InvalidArgumentError
from pagedkv.attention import CacheFormat, scale_shape
from pagedkv.kv_spec import BITS_PER_ELEMENT, KVSpec, int4_group_size

# Model, shape, published bytes per token.
PUBLISHED = [
    # Kwon et al., PagedAttention, SOSP 2023, section 3: "800 KB" for OPT-13B, 2 * 5120 * 40 * 2.
    ("OPT-13B", KVSpec(40, 40, 128, dtype="float16"), 819_200),
    ("Llama-2-7B", KVSpec(32, 32, 128, dtype="float16"), 512 * 1024),
    ("Llama-3-8B", KVSpec(32, 8, 128), 128 * 1024),
    ("Llama-3-70B", KVSpec(80, 8, 128), 320 * 1024),
    # "Insights into DeepSeek-V3", arXiv 2505.09343, table 1: 70.272, 327.680 and 516.096 KB per token in bfloat16.
    ("DeepSeek-V3", KVSpec.mla(61), 70_272),
    ("Qwen-2.5-72B", KVSpec(80, 8, 128), 327_680),
    ("Llama-3.1-405B", KVSpec(126, 8, 128), 516_096),
]


@pytest.mark.parametrize(("model", "spec", "published"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_bytes_per_token_are_those_that_were_published(model: str, spec: KVSpec, published: int) -> None:
    assert spec.bytes_per_token == published
    assert spec.bytes_per_block == published * spec.block_size


def test_a_shape_of_numpys_numbers_is_kept_as_plain_ones() -> None:
    spec = KVSpec(np.int64(2), np.int32(1), np.int64(8), block_size=np.int64(4))

    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.block_size)
    assert shape == (2, 1, 8, 8, 4)
    assert {type(number) for number in shape} == {int}


@pytest.mark.parametrize(
    ("dtype", "bytes_per_token"),
    [("float64", 1024), ("float32", 512), ("float16", 256), ("bfloat16", 256), ("float8_e4m3fn", 128), ("float8_e5m2", 128)],
)  # fmt: skip
def test_one_head_of_64_channels_takes_two_rows_of_elements(dtype: str, bytes_per_token: int) -> None:
    assert KVSpec(1, 1, 64, dtype=dtype).bytes_per_token == bytes_per_token


def test_int8_adds_a_float32_per_token_head_and_tensor() -> None:
    assert KVSpec(1, 2, 64, dtype="int8").bytes_per_token == 2 * (64 + 64 + 4 + 4)


def test_int4_adds_a_step_and_a_minimum_per_group_of_32_channels() -> None:
    assert KVSpec(1, 1, 64, dtype="int4").bytes_per_token == 2 * (32 + 2 * 2 * 2)


def test_a_latent_cache_has_one_scale_for_both() -> None:
    assert KVSpec.mla(1, dtype="int8").bytes_per_token == 576 + 4


def test_values_may_be_narrower_than_keys() -> None:
    assert KVSpec(1, 1, 192, dtype="float16", value_dim=128).bytes_per_token == 2 * (192 + 128)


def test_a_value_dim_that_is_the_head_dim_makes_no_other_spec() -> None:
    assert KVSpec(2, 2, 64, value_dim=64) == KVSpec(2, 2, 64)


def test_every_part_of_a_block_starts_at_a_multiple_of_16_bytes() -> None:
    spec = KVSpec(3, 1, 3, dtype="int8", block_size=1)

    assert [part.offset for part in spec.parts] == [0, 16, 32, 48]
    assert spec.bytes_per_block == 3 * 64
    assert spec.bytes_per_token == 3 * (3 + 3 + 4 + 4)


def test_as_many_blocks_fit_as_with_their_padding() -> None:
    spec = KVSpec(3, 1, 3, dtype="int8", block_size=1)

    assert (spec.num_blocks_for(2 * 192), spec.num_blocks_for(2 * 192 - 1)) == (2, 1)


def test_the_groups_of_int4_are_those_that_attention_asks_for() -> None:
    for dim in (2, 10, 16, 32, 48, 64, 80, 96, 128, 192, 256, 576):
        assert scale_shape(CacheFormat.INT4, 1, 1, 1, dim)[3] == dim // int4_group_size(dim)


def test_bits_per_element_are_torch_s() -> None:
    for name, bits in BITS_PER_ELEMENT.items():
        if name != "int4":
            assert getattr(torch, name).itemsize * 8 == bits


def test_as_many_blocks_fit_as_the_bytes_hold() -> None:
    spec = KVSpec(32, 8, 128)
    assert spec.bytes_per_block == 2 * 2**20

    assert spec.num_blocks_for(2 * 2**20) == 1
    assert spec.num_blocks_for(6 * 2**20 - 1) == 2


def test_bytes_for_less_than_a_block_are_refused_with_the_arithmetic() -> None:
    message = r"2097151 bytes hold no block: one takes 2097152 bytes \(16 tokens of 131072 bytes in 32 layers\)"
    with pytest.raises(InvalidArgumentError, match=message):
        KVSpec(32, 8, 128).num_blocks_for(2 * 2**20 - 1)


@pytest.mark.parametrize("num_bytes", [-1, 1.5, True, None])
def test_bytes_are_a_whole_number(num_bytes: object) -> None:
    with pytest.raises(InvalidArgumentError, match="num_bytes"):
        KVSpec(1, 1, 8).num_blocks_for(num_bytes)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "value_dim", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "8", 2**40])
def test_a_size_is_a_whole_number_within_its_cap(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        KVSpec(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, field: value})


@pytest.mark.parametrize("dtype", ["float", "uint8", "int16", None, torch.bfloat16])
def test_a_dtype_is_one_of_the_names(dtype: object) -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of float64, .*, int4, found"):
        KVSpec(1, 1, 8, dtype=dtype)


def test_fp8_by_its_short_name_is_told_of_the_long_one() -> None:
    with pytest.raises(ConfigError, match="found 'fp8': fp8 is float8_e4m3fn"):
        KVSpec(1, 1, 8, dtype="fp8")


def test_int4_needs_pairs_of_channels() -> None:
    with pytest.raises(ConfigError, match="head_dim must be even, found 7"):
        KVSpec(1, 1, 7, dtype="int4")
    with pytest.raises(ConfigError, match="value_dim must be even, found 5"):
        KVSpec(1, 1, 8, dtype="int4", value_dim=5)


def test_a_latent_s_values_lie_within_its_keys() -> None:
    with pytest.raises(ConfigError, match="value_dim 9 > head_dim 8"):
        KVSpec(1, 1, 8, value_dim=9, is_latent=True)


def test_a_latent_s_int4_values_end_with_a_group() -> None:
    with pytest.raises(ConfigError, match="value_dim 48 is no multiple of 32"):
        KVSpec.mla(1, latent_dim=48, rope_dim=16, dtype="int4")


def test_whether_it_is_latent_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="is_latent"):
        KVSpec(1, 1, 8, is_latent=1)


def test_sizes_are_computed_without_torch() -> None:
    code = "import sys, pagedkv.kv_spec; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("missing", "use", "what"),
    [
        ("torch", "import pagedkv.storage", "pagedkv.storage needs torch"),
        ("torch", "import pagedkv.attention", "pagedkv.attention needs torch"),
        (
            "safetensors",
            "from pagedkv.storage import KVSpec, read_saved; read_saved('file', KVSpec(1, 1, 8))",
            "saved blocks need safetensors",
        ),
    ],
)
def test_without_a_library_what_needs_it_says_which_extra_to_install(missing: str, use: str, what: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; {use}"

    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)

    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == f"ModuleNotFoundError: {what}: in a checkout of pagedkv, pip install '.[torch]'"
