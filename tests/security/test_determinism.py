"""I14, F9: the same inputs give the same events and plans, byte for byte, in every process and on every Python."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the first run printed; every other must print the same."""
    return []


@pytest.mark.parametrize(
    ("hash_seed", "options", "version"),
    [
        ("0", (), None),
        ("1", (), None),
        ("random", (), None),
        ("0", ("-O",), None),
        ("random", (), "3.11"),
        ("random", (), "3.12"),
        ("random", (), "3.13"),
        ("random", (), "3.14"),
    ],
)
def test_event_log_and_plans_are_the_same_everywhere(run_script, expected, hash_seed, options, version) -> None:
    printed = run_script("script_events.py", *options, version=version, hash_seed=hash_seed)
    expected.append(printed)

    assert printed == expected[0]
    assert len(printed.split()) == 2
