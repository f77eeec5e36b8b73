"""Every known-bad scheduler fails the tests, and the test that fails names the invariant that the bug breaks."""

from __future__ import annotations

import pytest

from pagedkv import InvariantViolation
from pagedkv.testing.scheduler_driver import Drive
from pagedkv.testing.scheduler_scenarios import scheduler_scenarios
from pagedkv.testing.scheduler_tests import SchedulerTests
from pagedkv.testing.scheduler_zoo import KNOWN_BAD_SCHEDULERS

TEST_OF = {name.rsplit("_", 1)[1].upper(): name for name in dir(SchedulerTests) if name.startswith("test_")}


@pytest.mark.parametrize("name", KNOWN_BAD_SCHEDULERS)
def test_the_test_of_the_invariant_catches(name: str) -> None:
    invariant, make = KNOWN_BAD_SCHEDULERS[name]
    tests = SchedulerTests()
    tests.make_scheduler = make  # type: ignore[method-assign]

    caught = []
    for scenario in scheduler_scenarios():
        try:
            getattr(tests, TEST_OF[invariant])(scenario)
        except InvariantViolation as violation:
            caught.append(violation.invariant)

    assert caught
    assert set(caught) == {invariant}


def test_there_is_a_bug_for_every_invariant_that_is_tested() -> None:
    assert {bad.invariant for bad in KNOWN_BAD_SCHEDULERS.values()} == set(TEST_OF)
    assert len(KNOWN_BAD_SCHEDULERS) == 20


def test_a_class_without_a_factory_says_what_to_supply() -> None:
    with pytest.raises(NotImplementedError, match="make_scheduler"):
        SchedulerTests().drive(scheduler_scenarios()[0], "I10")


def test_what_is_not_enforced_is_let_pass() -> None:
    drive = Drive(KNOWN_BAD_SCHEDULERS["counters fall"].make, scheduler_scenarios()[0], "I10")

    assert drive.run().count("\n") > 24
