"""S11: a mistake of the embedding engine is one typed error that changes nothing, with and without assertions."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("options", [(), ("-O",), ("-OO",)], ids=["plain", "O", "OO"])
def test_every_mistake_is_a_typed_error_and_leaves_all_sound(run_script, options: tuple[str, ...]) -> None:
    lines = [json.loads(line) for line in run_script("script_misuse.py", *options).splitlines()]

    assert [line for line in lines[:-1] if not line[2]] == []
    assert lines[-1] == ["after all", 1, 2, 2]
    assert len(lines) > 75


def test_verdicts_are_the_same_without_assertions(run_script) -> None:
    assert run_script("script_misuse.py", "-O") == run_script("script_misuse.py")
