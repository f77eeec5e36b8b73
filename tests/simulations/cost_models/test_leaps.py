"""k steps at once must cost, bit for bit, what k single steps cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.simulations.cost_models import (
    IDEAL,
    TYPICAL,
    LinearCostModel,
    RooflineCostModel,
    StepLoad,
    get_device,
    get_model,
)

MODELS = {
    "linear": LinearCostModel(
        base_s=1e-3,
        per_token_s=3e-6,
        per_context_token_s=7e-9,
        per_row_s=1.1e-5,
        per_copied_block_s=1.3e-6,
        per_swapped_block_s=1.7e-4,
    ),
    "dense": RooflineCostModel(get_model("Llama-3-8B"), get_device("H100"), block_size=16),
    "ideal": RooflineCostModel(get_model("Mistral-7B"), get_device("RTX-4090"), block_size=16, efficiency=IDEAL),
    "parallel": RooflineCostModel(get_model("Llama-3-70B"), get_device("A100-80G"), block_size=32, num_devices=8),
    "experts": RooflineCostModel(get_model("DeepSeek-V2-Lite"), get_device("H200"), block_size=64, efficiency=TYPICAL),
}
LARGEST = StepLoad(
    num_rows=4096,
    num_tokens=65536,
    num_sampled=4096,
    num_context_tokens=10**9,
    num_attention_pairs=10**14,
    num_copied_blocks=10**5,
    num_swapped_in_blocks=10**5,
    num_swapped_out_blocks=10**5,
)


@st.composite
def leaps(draw: st.DrawFn) -> tuple[int, StepLoad]:
    """k, and a load in which each field is either an int, or k ints in an array."""
    k = draw(st.integers(1, 6))
    fields = []
    for largest in LARGEST:
        number = st.integers(0, largest) | st.integers(0, 3)
        fields.append(draw(number | st.lists(number, min_size=k, max_size=k).map(lambda n: np.array(n, np.int64))))
    return k, StepLoad(*fields)


@pytest.mark.parametrize("name", sorted(MODELS))
@given(leap=leaps())
def test_a_leap_costs_bit_for_bit_what_its_steps_cost(name: str, leap: tuple[int, StepLoad]) -> None:
    model, (k, load) = MODELS[name], leap
    at_once = np.broadcast_to(model.step_time(load), (k,))
    for i in range(k):
        one_by_one = model.step_time(StepLoad(*(int(np.broadcast_to(field, (k,))[i]) for field in load)))
        assert type(one_by_one) is float
        assert one_by_one.hex() == float(at_once[i]).hex()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_decode_leap_gives_one_float64_per_step(name: str) -> None:
    k = np.arange(5)
    load = StepLoad(
        num_rows=8, num_tokens=8, num_sampled=8, num_context_tokens=800 + 8 * k, num_attention_pairs=800 + 8 * k
    )
    times = MODELS[name].step_time(load)
    assert times.shape == (5,)
    assert times.dtype == np.float64


@pytest.mark.parametrize("name", sorted(MODELS))
@given(leap=leaps(), field=st.sampled_from(StepLoad._fields), more=st.integers(1, 1000))
def test_more_work_never_takes_less_time(name: str, leap: tuple[int, StepLoad], field: str, more: int) -> None:
    model, (_, load) = MODELS[name], leap
    larger = load._replace(**{field: getattr(load, field) + more})
    assert np.all(model.step_time(larger) >= model.step_time(load))
