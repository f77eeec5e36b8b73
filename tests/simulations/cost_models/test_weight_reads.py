import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models import MixtureOfExperts, get_model
from pagedkv.simulations.cost_models.weight_reads import WeightReads, expected_num_experts


def _experts(num_routed_experts: int, num_experts_per_token: int) -> MixtureOfExperts:
    return MixtureOfExperts(
        num_routed_experts=num_routed_experts,
        num_experts_per_token=num_experts_per_token,
        num_shared_experts=0,
        expert_intermediate_size=1,
        num_dense_layers=0,
    )


def test_one_token_of_deepseek_v2_lite_touches_6_experts_and_two_touch_11_4375() -> None:
    moe = get_model("DeepSeek-V2-Lite").mixture_of_experts
    # 64 * (1 - (58/64)**2) = 64 * (1 - 0.8212890625)
    assert expected_num_experts(moe)[:3] == [0.0, 6.0, 11.4375]


def test_many_tokens_touch_every_expert_exactly() -> None:
    moe = get_model("DeepSeek-V2-Lite").mixture_of_experts
    assert expected_num_experts(moe)[-1] == 64.0
    assert len(expected_num_experts(moe)) < 500


def test_all_experts_per_token_means_all_from_the_first_token() -> None:
    assert expected_num_experts(_experts(4, 4)) == [0.0, 4.0]


def test_a_choice_so_sparse_that_the_table_explodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 of 10000000 experts per token is too sparse"):
        expected_num_experts(_experts(10_000_000, 1))


def test_dense_weights_are_read_once_or_not_at_all() -> None:
    reads = WeightReads(2.5)
    assert [reads.time(n) for n in (0, 1, 1000)] == [0.0, 2.5, 2.5]


def test_the_last_entry_holds_for_every_larger_number_of_tokens() -> None:
    reads = WeightReads(1.0, experts_s=2.0, mixture_of_experts=_experts(4, 2))
    assert [reads.time(n) for n in (0, 1, 2, 10**6)] == [0.0, 5.0, 7.0, 9.0]
    assert np.array_equal(reads.time(np.array([0, 1, 2, 10**6])), [0.0, 5.0, 7.0, 9.0])
