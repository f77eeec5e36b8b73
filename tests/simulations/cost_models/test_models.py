import dataclasses

import pytest

from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.simulations.cost_models import MODELS, LatentAttention, MixtureOfExperts, get_model


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mistral-7B", 7_248_023_552),
        ("Qwen2.5-7B", 7_615_616_512),
        ("DeepSeek-V2-Lite", 15_706_484_224),
    ],
)
def test_a_shape_gives_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    assert get_model(name).num_parameters == num_parameters


def test_deepseek_v2_lite_activates_2_4_billion_of_its_parameters_per_token() -> None:
    assert get_model("DeepSeek-V2-Lite").num_active_parameters == 2_451_435_008


def test_a_dense_model_activates_everything_but_the_embedding_table() -> None:
    model = get_model("Mistral-7B")
    assert model.num_parameters - model.num_active_parameters == 32768 * 4096


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("Llama-2-7B", 512 * 1024),
        ("Llama-3-8B", 128 * 1024),
        ("Llama-3-70B", 320 * 1024),
        ("Mistral-7B", 128 * 1024),
        ("Qwen2.5-7B", 56 * 1024),
        ("DeepSeek-V2-Lite", 27 * (512 + 64) * 2),
    ],
)
def test_16_bit_kv_bytes_of_one_token(name: str, kv_bytes: int) -> None:
    assert get_model(name).kv_bytes_per_token(16) == kv_bytes


def test_kv_bytes_halve_at_8_bits() -> None:
    assert get_model("Mistral-7B").kv_bytes_per_token(8) == 64 * 1024


def test_kv_heads_are_divided_among_devices_down_to_one_head_each() -> None:
    model = get_model("Llama-3-8B")
    assert [model.kv_bytes_per_token(16, num_devices=n) for n in (1, 2, 8, 16)] == [131072, 65536, 16384, 16384]


def test_the_latent_vector_of_mla_is_copied_to_every_device() -> None:
    assert get_model("DeepSeek-V2-Lite").kv_bytes_per_token(16, num_devices=8) == 31_104


def test_weight_bytes_follow_the_width() -> None:
    model = get_model("Mistral-7B")
    assert [model.weight_bytes(bits) for bits in (32, 16, 8, 4)] == [
        28_992_094_208,
        14_496_047_104,
        7_248_023_552,
        3_624_011_776,
    ]


def test_attention_costs_4_flops_per_pair_head_dimension_head_and_layer() -> None:
    assert get_model("Llama-3-8B").attention_flops_per_pair == 4 * 128 * 32 * 32


def test_mla_scores_over_192_dimensions_and_sums_over_128() -> None:
    assert get_model("DeepSeek-V2-Lite").attention_flops_per_pair == 2 * (192 + 128) * 16 * 27


def test_the_tiny_model_adds_up(tiny_model) -> None:
    assert tiny_model.attention_parameters_per_layer == 12
    assert tiny_model.shared_matrix_parameters == 30
    assert tiny_model.vector_parameters == 6
    assert tiny_model.num_parameters == 56


def test_tied_embeddings_are_counted_once_but_the_lm_head_is_still_read(tiny_model) -> None:
    tied = dataclasses.replace(tiny_model, has_tied_embeddings=True)
    assert tied.num_parameters == 46
    assert tied.num_active_parameters == tiny_model.num_active_parameters == 46


def test_lookup_ignores_case() -> None:
    assert get_model("deepseek-v2-LITE") is MODELS["DeepSeek-V2-Lite"]


def test_an_unknown_model_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'gpt-5'; known: Llama-2-7B, Llama-3-8B, .*, DeepSeek-V2-Lite"):
        get_model("gpt-5")


def test_every_preset_names_its_source() -> None:
    assert all("config.json of " in model.source for model in MODELS.values())


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "num_kv_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan")])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(tiny_model, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be an integer of at least 1"):
        dataclasses.replace(tiny_model, **{field: value})


def test_query_heads_must_be_a_multiple_of_the_kv_heads(tiny_model) -> None:
    with pytest.raises(ConfigError, match=r"num_q_heads \(3\) must be a multiple of num_kv_heads \(2\)"):
        dataclasses.replace(tiny_model, num_q_heads=3, num_kv_heads=2)


def _experts(**changes: int) -> MixtureOfExperts:
    sizes = {
        "num_routed_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 0,
        "expert_intermediate_size": 1,
        "num_dense_layers": 0,
    }
    return MixtureOfExperts(**(sizes | changes))


def test_more_experts_per_token_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_experts_per_token \(5\) exceeds num_routed_experts \(4\)"):
        _experts(num_experts_per_token=5)


@pytest.mark.parametrize("field", ["num_shared_experts", "num_dense_layers"])
def test_a_negative_number_of_shared_experts_or_dense_layers_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be an integer of at least 0"):
        _experts(**{field: -1})


def test_more_dense_layers_than_layers_is_refused(tiny_model) -> None:
    with pytest.raises(ConfigError, match=r"num_dense_layers \(2\) exceeds num_layers \(1\)"):
        dataclasses.replace(tiny_model, mixture_of_experts=_experts(num_dense_layers=2))


def test_a_latent_rank_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^kv_lora_rank must be"):
        LatentAttention(kv_lora_rank=0, qk_nope_head_dim=1, qk_rope_head_dim=1, v_head_dim=1)


@pytest.mark.parametrize("bits", [0, 1, 12, -8, 16.0, True])
def test_a_width_other_than_4_8_16_32_is_refused(tiny_model, bits: object) -> None:
    with pytest.raises(ConfigError, match="bits must be one of 4, 8, 16, 32"):
        tiny_model.weight_bytes(bits)
    with pytest.raises(ConfigError, match="bits must be one of 4, 8, 16, 32"):
        tiny_model.kv_bytes_per_token(bits)


@pytest.mark.parametrize("num_devices", [3, 7, 56])
def test_heads_that_devices_cannot_share_evenly_are_refused(num_devices: int) -> None:
    with pytest.raises(ConfigError, match="28 query and 4 KV heads"):
        get_model("Qwen2.5-7B").require_divisible_among(num_devices)
