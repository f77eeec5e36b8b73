"""A fit finds the constants that made the steps, says what it cannot know, and survives the file."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.simulations.cost_models import LinearCostModel, StepLoad, fit_steps, load_cost_model, save_cost_model

TRUE = LinearCostModel(
    base_s=3e-3,
    per_token_s=2e-4,
    per_context_token_s=5e-7,
    per_row_s=1e-4,
    per_attention_pair_s=1e-8,
    per_copied_block_s=4e-5,
    per_swapped_block_s=3e-4,
)


def mixed_steps(num_steps: int = 400) -> StepLoad:
    """Decodes, prefills of up to 512 tokens, and both; some copy and swap blocks."""
    random = np.random.default_rng(5)
    num_decodes = random.integers(0, 64, num_steps)
    num_prefills = np.where(num_decodes > 0, random.integers(0, 3, num_steps), 1)
    chunk = random.integers(1, 512, num_steps)
    num_tokens = num_decodes + num_prefills * chunk
    context = num_decodes * random.integers(1, 2000, num_steps) + num_prefills * chunk
    pairs = context + num_prefills * (chunk * (chunk - 1) // 2)
    copied, swapped_in, swapped_out = (random.poisson(0.1, num_steps) for _ in range(3))
    return StepLoad(
        num_decodes + num_prefills, num_tokens, num_decodes, context, pairs, copied, swapped_in, swapped_out
    )


def test_exact_steps_give_their_constants_back() -> None:
    load = mixed_steps()

    fit = fit_steps(load, TRUE.step_time(load))

    for name, value in asdict(TRUE).items():
        assert getattr(fit.model, name) == pytest.approx(value, rel=1e-6), name
    assert fit.unidentified == {}
    assert fit.p90_error < 1e-9
    assert fit.r_squared == pytest.approx(1.0, abs=1e-12)
    assert (fit.num_steps, fit.num_outliers) == (400, 0)


def test_noise_of_a_tenth_moves_constants_by_few_standard_errors() -> None:
    load = mixed_steps()
    noise = np.random.default_rng(6).normal(1.0, 0.1, 400)

    fit = fit_steps(load, TRUE.step_time(load) * noise)

    assert 0.05 < fit.median_error < 0.09  # 0.674 of the standard deviation
    for name in ("base_s", "per_token_s", "per_context_token_s", "per_swapped_block_s"):
        error = fit.standard_errors[name]
        assert error is not None
        assert abs(getattr(fit.model, name) - getattr(TRUE, name)) < 3 * error, name
    assert fit.total_model_s == pytest.approx(fit.total_measured_s, rel=0.02)


def test_slow_steps_while_warming_up_hardly_move_the_fit() -> None:
    load = mixed_steps()
    durations = TRUE.step_time(load) * np.random.default_rng(6).normal(1.0, 0.02, 400)
    durations[:4] *= 50

    fit = fit_steps(load, durations)

    assert fit.num_outliers == 4
    assert fit.model.per_token_s == pytest.approx(2e-4, rel=0.02)
    assert fit.model.base_s == pytest.approx(3e-3, rel=0.05)


def test_short_steps_count_as_much_as_long_ones() -> None:
    # 200 decodes of 1 ms that are told exactly, 200 prefills of 1 s that are 20 % off either way.
    tokens = np.array([1] * 200 + [1000] * 200)
    load = StepLoad(np.ones(400), tokens, np.ones(400), tokens, tokens)
    durations = np.where(tokens == 1, 1e-3, np.where(np.arange(400) % 2, 0.8, 1.2))

    fit = fit_steps(load, durations)

    assert float(fit.model.step_time(StepLoad(1, 1, 1, 1, 1))) == pytest.approx(1e-3, rel=0.01)


def test_what_no_step_did_and_what_always_goes_together_is_named() -> None:
    # Nothing but decodes: one token a row, and as many pairs as context.
    rows = np.array([1, 2, 3, 4, 5, 6, 7, 8] * 3)
    context = rows * np.arange(100, 124)
    load = StepLoad(rows, rows, rows, context, context)

    fit = fit_steps(load, 1e-3 + 2e-4 * rows + 1e-6 * context)

    assert fit.unidentified == {
        "per_row_s": "cannot be told apart from per_token_s in these steps, and is counted there",
        "per_attention_pair_s": "cannot be told apart from per_context_token_s in these steps, and is counted there",
        "per_swapped_block_s": "no step had any",
        "per_copied_block_s": "no step had any",
    }
    assert fit.model.per_token_s == pytest.approx(2e-4)
    assert fit.model.per_context_token_s == pytest.approx(1e-6)
    assert (fit.model.per_row_s, fit.model.per_attention_pair_s) == (0.0, 0.0)
    assert fit.standard_errors["per_row_s"] is None


def test_a_constant_that_would_be_negative_is_zero_and_the_others_are_fitted_without_it() -> None:
    tokens = np.arange(1, 41)
    load = StepLoad(np.ones(40), tokens, np.ones(40), tokens, tokens)

    fit = fit_steps(load, 1e-3 * tokens - 1e-4)

    assert fit.model.base_s == 0.0
    assert fit.standard_errors["base_s"] is None
    assert fit.model.per_token_s == pytest.approx(1e-3, rel=0.05)


def test_the_fit_does_not_depend_on_the_order_of_the_steps() -> None:
    load = mixed_steps()
    durations = TRUE.step_time(load) * np.random.default_rng(6).normal(1.0, 0.1, 400)
    order = np.random.default_rng(7).permutation(400)

    fit = fit_steps(load, durations)
    shuffled = fit_steps(StepLoad(*(field[order] for field in load)), durations[order])

    assert asdict(shuffled.model) == pytest.approx(asdict(fit.model), rel=1e-6)


@pytest.mark.parametrize(("num_steps", "duration"), [(9, 1.0), (20, 0.0), (20, float("nan"))])
def test_too_few_steps_or_impossible_times_are_refused(num_steps: int, duration: float) -> None:
    ones = np.ones(num_steps)

    with pytest.raises(InvalidArgumentError, match=r"needs at least 10 steps, found 9|finite time above 0 s"):
        fit_steps(StepLoad(ones, ones, ones, ones, ones), ones * duration)


def test_steps_of_one_length_have_no_variance_to_explain() -> None:
    count = np.arange(1, 13)

    fit = fit_steps(StepLoad(count, count, count, count, count), np.full(12, 0.1))

    assert fit.r_squared is None
    assert fit.p90_error < 1e-12


def test_a_saved_model_is_loaded_to_the_last_bit(tmp_path: Path) -> None:
    load = mixed_steps()
    fit = fit_steps(load, TRUE.step_time(load) * np.random.default_rng(6).normal(1.0, 0.1, 400))

    save_cost_model(fit, tmp_path / "m.json", {"folder": "monday"})

    assert load_cost_model(tmp_path / "m.json") == fit.model
    document = json.loads((tmp_path / "m.json").read_text())
    assert document["source"] == {"folder": "monday"}
    assert document["fit"]["num_steps"] == 400
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a cost model that `pagedkv fit` wrote"),
        ("[" * 100_000, "expected a cost model that `pagedkv fit` wrote"),
        ("[1]", "expected a cost model that `pagedkv fit` wrote"),
        ('{"kind": "linear"}', "version 1, found kind 'linear', version None"),
        ('{"pagedkv_cost_model": 1, "kind": "roofline"}', "found kind 'roofline'"),
        ('{"pagedkv_cost_model": 1, "kind": "linear"}', "expected a key 'base_s', found none"),
        ("negative", "per_row_s must be a finite number of at least 0, got -1"),
        ("huge", "expected per_token_s of at most 1,000,000 s, found 1e+300"),
        ("tiny", "expected steps of at least 1e-09 s, found 3e-300"),
        ("text", "base_s must be a finite number of at least 0, got 'x'"),
    ],
)
def test_a_file_that_is_no_model_is_one_typed_line(tmp_path: Path, content: str, message: str) -> None:
    whole = {"pagedkv_cost_model": 1, "kind": "linear", **asdict(TRUE)}
    changes = {"negative": {"per_row_s": -1}, "huge": {"per_token_s": 1e300}, "text": {"base_s": "x"}}
    changes["tiny"] = dict.fromkeys(("base_s", "per_token_s", "per_row_s"), 1e-300)
    made = json.dumps(whole | changes[content]) if content in changes else content
    (tmp_path / "m.json").write_text(made)

    with pytest.raises(ConfigError) as caught:
        load_cost_model(tmp_path / "m.json")

    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/m.json: ")
    assert "\n" not in str(caught.value)
