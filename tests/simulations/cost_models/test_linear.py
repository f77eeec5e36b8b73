import json

import pytest

from pagedkv.errors import ConfigError
from pagedkv.simulations.cost_models import CostModel, LinearCostModel, StepLoad, TransferCosts

COEFFICIENTS = {
    "base_s": 1.0,
    "per_token_s": 2.0,
    "per_context_token_s": 0.5,
    "per_row_s": 4.0,
    "per_attention_pair_s": 0.25,
    "per_copied_block_s": 8.0,
    "per_swapped_block_s": 16.0,
}


def test_step_time_is_the_weighted_sum_of_the_aggregates() -> None:
    load = StepLoad(
        num_rows=2,
        num_tokens=3,
        num_sampled=2,
        num_context_tokens=10,
        num_attention_pairs=100,
        num_copied_blocks=1,
        num_swapped_in_blocks=2,
        num_swapped_out_blocks=3,
    )
    assert LinearCostModel(**COEFFICIENTS).step_time(load) == 1 + 3 * 2 + 10 * 0.5 + 2 * 4 + 100 * 0.25 + 1 * 8 + 5 * 16


def test_it_answers_what_swap_or_recompute_asks() -> None:
    model = LinearCostModel(**COEFFICIENTS)
    assert isinstance(model, CostModel)
    assert isinstance(model, TransferCosts)
    assert model.prefill_s_per_token == 2.0
    assert model.swap_s_per_block == 16.0


def test_description_is_json_with_every_coefficient() -> None:
    assert json.loads(json.dumps(LinearCostModel(**COEFFICIENTS).describe())) == {
        "kind": "linear",
        "name": "linear",
        **COEFFICIENTS,
    }


@pytest.mark.parametrize("field", sorted(COEFFICIENTS))
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), True, "1"])
def test_a_coefficient_that_is_negative_or_not_finite_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be a finite number of at least 0"):
        LinearCostModel(**(COEFFICIENTS | {field: value}))


def test_a_model_in_which_a_step_takes_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="a step takes no time"):
        LinearCostModel(base_s=0.0, per_token_s=0.0, per_context_token_s=1.0)
