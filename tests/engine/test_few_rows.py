"""Linear layers on few tokens: the same results by another product, for those layers only that gain, and put back after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pagedkv.engine.model import few_rows
from pagedkv.engine.model.few_rows import few_rows_forward, gains_from_few_rows
from pagedkv.engine.model.patches import Patches


def no_attention(*_args: object, **_kwargs: object) -> tuple[torch.Tensor, None]:
    raise AssertionError("there is none in these models")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 6, 8, 9])
@pytest.mark.parametrize(("num_in", "num_out"), [(96, 32), (32, 96)])
def test_rows_are_those_of_the_layer(num_in: int, num_out: int, num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias)
    x = torch.randn(1, num_rows, num_in)
    exact = layer.double()(x.double())
    layer.float()
    with torch.inference_mode():
        own, theirs = few_rows_forward(layer)(x), layer(x)
    assert own.shape == theirs.shape
    assert own.is_contiguous()
    assert torch.all((own - exact).abs() <= 2e-6 * num_in**0.5)


@pytest.mark.parametrize(("num_out", "rows_that_gain"), [(8, range(2, 6)), (15, range(2, 6)), (16, range(2, 9))])
def test_the_other_product_is_taken_where_it_gains(
    monkeypatch: pytest.MonkeyPatch, num_out: int, rows_that_gain: range
) -> None:
    plain: list[int] = []
    monkeypatch.setattr(few_rows, "linear", lambda x, *_: plain.append(len(x)))
    forward = few_rows_forward(nn.Linear(8, num_out))
    for num_rows in range(12):
        forward(torch.randn(num_rows, 8))
    assert plain == [num_rows for num_rows in range(12) if num_rows not in rows_that_gain]


def test_an_input_of_any_shape_and_strides_is_taken() -> None:
    layer = nn.Linear(8, 16)
    x = torch.randn(8, 2, 2).permute(1, 2, 0)
    torch.testing.assert_close(few_rows_forward(layer)(x), layer(x))


def test_weights_that_change_are_the_ones_used() -> None:
    layer = nn.Linear(8, 16, bias=False)
    forward = few_rows_forward(layer)
    layer.weight = nn.Parameter(torch.ones(16, 8))
    assert forward(torch.ones(2, 8)).eq(8).all()


def test_only_plain_layers_in_float32_that_nobody_wrapped_take_part() -> None:
    wrapped = nn.Linear(4, 4)
    wrapped.forward = wrapped.forward  # type: ignore[method-assign] # As libraries do that move weights about.

    class Adapted(nn.Linear):
        """A layer with a mind of its own."""

    assert gains_from_few_rows(nn.Linear(4, 4))
    assert not gains_from_few_rows(nn.Linear(4, 4, dtype=torch.bfloat16))
    assert not gains_from_few_rows(nn.Linear(4, 4, device="meta"))
    assert not gains_from_few_rows(wrapped)
    assert not gains_from_few_rows(Adapted(4, 4))


def test_a_model_has_its_own_layers_back_after_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    patches = Patches(model, no_attention)
    with patches:
        assert ["forward" in vars(layer) for layer in model] == [True, False]
    assert ["forward" in vars(layer) for layer in model] == [False, False]
