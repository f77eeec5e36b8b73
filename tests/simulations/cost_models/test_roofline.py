import dataclasses
import json

import pytest

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models import (
    IDEAL,
    TYPICAL,
    CostModel,
    Efficiency,
    MixtureOfExperts,
    RooflineCostModel,
    StepLoad,
    TransferCosts,
    get_device,
    get_model,
)

DECODE = StepLoad(num_rows=1, num_tokens=1, num_sampled=1, num_context_tokens=3, num_attention_pairs=3)
PREFILL = StepLoad(num_rows=1, num_tokens=16, num_sampled=1, num_context_tokens=16, num_attention_pairs=136)
FIRST_TOKEN = StepLoad(num_rows=1, num_tokens=1, num_sampled=1, num_context_tokens=1, num_attention_pairs=1)
NOTHING = StepLoad(num_rows=0, num_tokens=0, num_sampled=0, num_context_tokens=0, num_attention_pairs=0)


@pytest.fixture
def tiny(tiny_model, tiny_device):
    def build(**options):
        return RooflineCostModel(tiny_model, tiny_device, **({"block_size": 2, "efficiency": IDEAL} | options))

    return build


def test_decoding_is_bound_by_reading_weights_and_kv(tiny) -> None:
    # Compute (2*30 + 2*10 + 8*3) / 16 = 6.5 s; memory ((36 + 10) * 2 bytes + 4 bytes * (3 + 1)) / 4 = 27 s.
    assert tiny().step_time(DECODE) == 27.0


def test_a_long_prefill_is_bound_by_compute(tiny) -> None:
    # Compute (2*30*16 + 2*10 + 8*136) / 16; memory would take 55 s.
    assert tiny().step_time(PREFILL) == 129.25


def test_the_lm_head_is_computed_for_sampled_rows_only(tiny) -> None:
    assert tiny().step_time(PREFILL._replace(num_sampled=0)) == 128.0


def test_the_lm_head_is_read_only_if_a_row_samples(tiny) -> None:
    assert tiny().step_time(DECODE._replace(num_sampled=0)) == 27.0 - 5.0


def test_weights_are_read_once_however_many_rows_decode(tiny) -> None:
    # Only K/V grows: 4 bytes * (2*3 + 2) / 4 = 8 s instead of 4 s.
    load = StepLoad(num_rows=2, num_tokens=2, num_sampled=2, num_context_tokens=6, num_attention_pairs=6)
    assert tiny().step_time(load) == 31.0


def test_8_bit_weights_are_read_in_half_the_time(tiny) -> None:
    assert tiny(weight_bits=8).step_time(DECODE) == 27.0 - 11.5


def test_8_bit_kv_is_read_in_half_the_time(tiny) -> None:
    assert tiny(kv_bits=8).step_time(DECODE) == 27.0 - 2.0


def test_narrow_weights_do_not_compute_faster(tiny) -> None:
    assert tiny(weight_bits=4).step_time(PREFILL) == 129.25


def test_a_copied_block_is_read_and_written(tiny) -> None:
    assert tiny().step_time(DECODE._replace(num_copied_blocks=1)) == 27.0 + 4.0


def test_blocks_are_swapped_over_the_host_link_in_either_direction(tiny) -> None:
    assert tiny().step_time(DECODE._replace(num_swapped_in_blocks=1, num_swapped_out_blocks=2)) == 27.0 + 12.0


def test_a_step_that_only_swaps_reads_no_weights(tiny) -> None:
    assert tiny().step_time(NOTHING._replace(num_swapped_out_blocks=1)) == 4.0


def test_two_devices_halve_weights_and_flops_and_pay_for_all_reduces(tiny) -> None:
    # Memory (46 + 4 * 4) / 4, the single KV head being copied; 2 all-reduces of 4 bytes, half of it sent twice, at 2/s.
    assert tiny(num_devices=2).step_time(DECODE) == 15.5 + 4.0


def test_an_all_reduce_has_a_latency(tiny) -> None:
    efficiency = dataclasses.replace(IDEAL, all_reduce_latency_s=0.25)
    assert tiny(num_devices=2, efficiency=efficiency).step_time(DECODE) == 15.5 + 4.0 + 0.5
    assert tiny(num_devices=1, efficiency=efficiency).step_time(DECODE) == 27.0


@pytest.mark.parametrize(
    ("changes", "decode_s", "prefill_s"),
    [
        ({"memory": 0.5}, 54.0, 129.25),
        ({"compute": 0.5}, 27.0, 258.5),
        ({"step_overhead_s": 1.0}, 28.0, 130.25),
    ],
)
def test_an_efficiency_slows_down_what_it_names(tiny, changes: dict, decode_s: float, prefill_s: float) -> None:
    model = tiny(efficiency=dataclasses.replace(IDEAL, **changes))
    assert (model.step_time(DECODE), model.step_time(PREFILL)) == (decode_s, prefill_s)


def test_half_a_host_link_doubles_swaps(tiny) -> None:
    assert tiny(efficiency=dataclasses.replace(IDEAL, host_link=0.5)).swap_s_per_block == 8.0


def test_half_a_device_link_doubles_all_reduces(tiny) -> None:
    model = tiny(num_devices=2, efficiency=dataclasses.replace(IDEAL, device_link=0.5))
    assert model.step_time(DECODE) == 15.5 + 8.0


def test_it_answers_what_swap_or_recompute_asks(tiny) -> None:
    assert isinstance(tiny(), CostModel)
    assert isinstance(tiny(), TransferCosts)
    assert tiny().prefill_s_per_token == 3.75
    assert tiny(num_devices=2).prefill_s_per_token == 1.875 + 4.0
    assert tiny().swap_s_per_block == 4.0


def test_only_the_experts_that_tokens_touch_are_read(tiny_model, tiny_device) -> None:
    # 4 experts of 3*2*1 = 6 weights, 2 per token, in the only layer, with a router of 8: attention 12 + router 8
    # + norms 6 = 26 weights for every step, 12 for the first token's experts, 18 for those of two tokens.
    moe = MixtureOfExperts(
        num_routed_experts=4,
        num_experts_per_token=2,
        num_shared_experts=0,
        expert_intermediate_size=1,
        num_dense_layers=0,
    )
    model = RooflineCostModel(
        dataclasses.replace(tiny_model, mixture_of_experts=moe), tiny_device, block_size=2, efficiency=IDEAL
    )
    one = StepLoad(num_rows=1, num_tokens=1, num_sampled=0, num_context_tokens=1, num_attention_pairs=1)
    two = StepLoad(num_rows=2, num_tokens=2, num_sampled=0, num_context_tokens=2, num_attention_pairs=2)
    assert model.step_time(one) == (26 + 12) * 2 / 4 + 2.0
    assert model.step_time(two) == (26 + 18) * 2 / 4 + 4.0


def test_mistral_7b_on_an_rtx_4090_needs_14_1_ms_per_token() -> None:
    # "LLM inference speed of light", zeux.io: 14.2 GB of fp16 weights over 1008 GB/s.
    model = RooflineCostModel(get_model("Mistral-7B"), get_device("RTX-4090"), block_size=16, efficiency=IDEAL)
    assert round(model.step_time(FIRST_TOKEN) * 1e3, 1) == 14.1
    assert model.step_time(FIRST_TOKEN) == pytest.approx(14.115e-3, abs=0.5e-6)


def test_mistral_7b_with_8_bit_weights_needs_7_0_ms_per_token_up_to_rounding() -> None:
    # 7.1 GB, half of the source's rounded 14.2 GB, take 7.044 ms; the exact 7_113_805_824 bytes take 7.057 ms.
    model = RooflineCostModel(
        get_model("Mistral-7B"), get_device("RTX-4090"), block_size=16, weight_bits=8, efficiency=IDEAL
    )
    assert model.step_time(FIRST_TOKEN) == pytest.approx(7.1 / 1008, rel=2e-3)
    assert model.step_time(FIRST_TOKEN) == pytest.approx(7.0576e-3, abs=0.5e-6)


def test_the_weights_that_mistral_7b_reads_per_token_are_14_2_gb() -> None:
    # All of them but the input embedding table (32768 * 4096), of which a token reads one row.
    assert get_model("Mistral-7B").num_active_parameters * 2 == 14_227_611_648


def test_llama_3_8b_on_an_h100() -> None:
    model = RooflineCostModel(get_model("Llama-3-8B"), get_device("H100"), block_size=16, efficiency=IDEAL)
    # 15_009_849_344 bytes of weights over 3.35 TB/s; 29_688_401_494_016 FLOPs over 989.4 TFLOP/s.
    prefill = StepLoad(
        num_rows=1, num_tokens=2048, num_sampled=1, num_context_tokens=2048, num_attention_pairs=2_098_176
    )
    assert model.step_time(FIRST_TOKEN) == pytest.approx(4.4806e-3, abs=0.1e-6)
    assert model.step_time(prefill) == pytest.approx(30.0065e-3, abs=0.1e-6)
    assert model.swap_s_per_block == 2 * 2**20 / 64e9


def test_one_token_of_deepseek_v2_lite_reads_its_active_parameters_and_many_tokens_read_them_all() -> None:
    model = RooflineCostModel(get_model("DeepSeek-V2-Lite"), get_device("H200"), block_size=16, efficiency=IDEAL)
    # 2_451_435_008 weights of 2 bytes, and 31_104 bytes of K/V read and written, over 4.8 TB/s.
    assert model.step_time(FIRST_TOKEN) == pytest.approx((4_902_870_016 + 62_208) / 4.8e12, rel=1e-12)
    # 512 first tokens: 15_706_484_224 weights less the embedding table of 209_715_200.
    many = StepLoad(num_rows=512, num_tokens=512, num_sampled=512, num_context_tokens=512, num_attention_pairs=512)
    assert model.step_time(many) == pytest.approx((30_993_538_048 + 512 * 62_208) / 4.8e12, rel=1e-12)


def test_the_default_is_typical_and_never_faster_than_ideal(tiny) -> None:
    assert tiny(efficiency=TYPICAL).step_time(DECODE) == pytest.approx(27.0 / 0.8 + 0.5e-3)


def test_name_and_description_say_what_was_modelled() -> None:
    model = RooflineCostModel(get_model("Llama-3-70B"), get_device("H100"), block_size=16, num_devices=4, kv_bits=8)
    described = json.loads(json.dumps(model.describe(), allow_nan=False))
    assert model.name == "roofline(Llama-3-70B, 4 x H100)"
    assert described["kind"] == "roofline"
    assert described["model"]["num_layers"] == 80
    assert described["device"]["source"].startswith("NVIDIA H100 data sheet")
    assert (described["block_size"], described["num_devices"]) == (16, 4)
    assert (described["weight_bits"], described["kv_bits"]) == (16, 8)
    assert described["efficiency"]["compute"] == 0.6


def test_changing_a_description_does_not_change_the_next(tiny) -> None:
    model = tiny()
    model.describe()["efficiency"]["compute"] = 0.0
    assert model.describe()["efficiency"]["compute"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be"),
        ({"weight_bits": 5}, "weight_bits must be one of"),
        ({"kv_bits": 0}, "kv_bits must be one of"),
        ({"num_devices": 0}, "num_devices must be"),
        ({"num_devices": 3}, "tiny has 2 query and 1 KV heads"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(tiny, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny(**options)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan"), float("inf"), True])
@pytest.mark.parametrize("field", ["compute", "memory", "device_link", "host_link"])
def test_an_efficiency_outside_0_to_1_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be above 0 and at most 1"):
        Efficiency(**{field: value})


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["step_overhead_s", "all_reduce_latency_s"])
def test_a_fixed_time_below_0_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be a finite number of at least 0"):
        Efficiency(**{field: value})
