import numpy as np
import pytest

from pagedkv import InvalidArgumentError
from pagedkv.arrays import as_int, as_token_ids, cdiv


def test_division_rounds_up() -> None:
    assert [cdiv(0, 4), cdiv(1, 4), cdiv(4, 4), cdiv(5, 4)] == [0, 1, 1, 2]


def test_whole_numbers_inside_the_range_are_ints() -> None:
    assert as_int("n", 0, at_least=0, at_most=3) == 0
    assert as_int("n", 3, at_least=0, at_most=3) == 3
    assert type(as_int("n", np.int64(2), at_least=0, at_most=3)) is int


@pytest.mark.parametrize("value", [-1, 4, 2**70, True, np.True_, 1.0, float("nan"), float("inf"), "1", None])
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^n must be"):
        as_int("n", value, at_least=0, at_most=3)


@pytest.mark.parametrize("values", [[1, 2], (1, 2), np.array([1, 2], np.uint8), np.array([1, 2]), iter([1, 2])])
def test_token_ids_of_any_kind_become_int32(values: object) -> None:
    array = as_token_ids("prompt", values)
    assert (array.tolist(), array.dtype) == ([1, 2], np.int32)


def test_token_ids_are_copied() -> None:
    own = np.array([1, 2], np.int32)
    array = as_token_ids("prompt", own)
    own[0] = 9
    assert array.tolist() == [1, 2]


def test_the_largest_token_id_is_accepted() -> None:
    assert as_token_ids("prompt", [0, 2**31 - 1]).tolist() == [0, 2**31 - 1]


@pytest.mark.parametrize(
    "values",
    [
        [-1],
        [2**31],
        [2**63],
        [2**70],
        [-1, 2**63],
        [0.0],
        [float("nan")],
        [None],
        ["1"],
        "12",
        [True],
        [True, 1],
        (5, 1, False),
        [7] * 40 + [np.True_],
        [[1, 2]],
        [[1], [1, 2]],
        np.array(3),
        np.array([[1]]),
        np.array([1.0]),
        7,
        None,
    ],
)
def test_other_token_ids_are_refused_by_name(values: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^prompt must be"):
        as_token_ids("prompt", values)


@pytest.mark.parametrize("values", ["hello", "", ["hel", "lo"], np.array(["hello"])])
def test_a_text_is_to_be_made_tokens_first(values: object) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^prompt must be one row of whole numbers, found .*: tokenise it first$"
    ):
        as_token_ids("prompt", values)


@pytest.mark.parametrize("values", [[0, 1], [1] * 40, (0, 1), [np.int64(1), 0]])
def test_whole_numbers_that_equal_booleans_are_tokens(values: object) -> None:
    assert as_token_ids("prompt", values).tolist() == list(values)
