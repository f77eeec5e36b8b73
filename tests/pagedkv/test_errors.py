import pytest

import pagedkv
from pagedkv import InvariantViolation, OutOfBlocksError, PagedKVError, UnknownIdError

ERRORS = [getattr(pagedkv, name) for name in pagedkv.__all__ if name.endswith(("Error", "Violation"))]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_of_ours_has_one_base(error: type[Exception]) -> None:
    assert issubclass(error, PagedKVError)


def test_a_caller_s_mistake_is_also_the_builtin_error_that_people_catch() -> None:
    assert issubclass(pagedkv.UnknownIdError, KeyError)
    for error in (pagedkv.InvalidArgumentError, pagedkv.BlockStateError, pagedkv.DuplicateIdError):
        assert issubclass(error, ValueError)


def test_neither_shortage_nor_bug_is_a_value_error() -> None:
    for error in (OutOfBlocksError, InvariantViolation):
        assert not issubclass(error, ValueError | KeyError)


def test_an_unknown_id_reads_as_a_sentence() -> None:
    assert str(UnknownIdError("no open sequence 'a'")) == "no open sequence 'a'"


def test_a_violation_names_its_invariant() -> None:
    violation = InvariantViolation("I2", "two")
    assert (violation.invariant, str(violation)) == ("I2", "I2: two")
