"""Every known-bad allocator is caught, by the random calls and by the state machine, for what it breaks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

from pagedkv import InvariantViolation
from pagedkv.testing import AllocatorMachine, verify
from pagedkv.testing.zoo import KNOWN_BAD, KnownBad

# Without shrinking: a verdict is asked for, not a small example.
QUICK = settings(
    max_examples=300,
    stateful_step_count=50,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
    derandomize=True,
    database=None,
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)


# It takes the state machine seconds to come upon these; random calls find them at once.
SLOW_FOR_THE_MACHINE = {
    "ClosingForgetsTheHost",
    "EvictsItsOwnHits",
    "FailedSwapInDropsTheHostCopy",
    "ForkOntoALiveId",
    "HostBlockIsGivenTwice",
    "HostBlocksStayAfterSwapIn",
    "NamedBeforeItIsFull",
    "SaltIsCutShort",
    "SwapsInFromTheHead",
    "SwapsInReversed",
}
FOR_THE_MACHINE = [
    pytest.param(bad, marks=pytest.mark.slow if bad.__name__ in SLOW_FOR_THE_MACHINE else ()) for bad in KNOWN_BAD
]


def name_of(bad: type[KnownBad]) -> str:
    return bad.__name__


def test_the_zoo_is_large_and_covers_what_an_allocator_can_break() -> None:
    assert len(KNOWN_BAD) >= 50
    assert {bad.invariant for bad in KNOWN_BAD} == {
        "I1",
        "I2",
        "I3",
        "I4",
        "I5",
        "I6",
        "I7",
        "I8",
        "I9",
        "I10",
        "I12",
        "I14",
    }
    assert all(bad.__doc__ for bad in KNOWN_BAD)


@pytest.mark.parametrize("bad", KNOWN_BAD, ids=name_of)
def test_random_calls_catch(bad: type[KnownBad]) -> None:
    found = []
    for seed in range(3):
        report = verify(bad, num_operations=20_000, seed=seed)
        assert report.failure is not None, f"seed {seed}: nothing noticed that {bad.__doc__}"
        found.append(report.failure.invariant)

    assert bad.invariant in found
    assert set(found) <= {bad.invariant, *bad.consequences}


@pytest.mark.parametrize("bad", FOR_THE_MACHINE, ids=name_of)
def test_the_state_machine_catches(bad: type[KnownBad]) -> None:
    machine = type("Machine", (AllocatorMachine,), {"make_allocator": bad})

    with pytest.raises(InvariantViolation) as caught:
        run_state_machine_as_test(machine, settings=QUICK)

    assert caught.value.invariant in (bad.invariant, *bad.consequences)
