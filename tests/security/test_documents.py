"""What SECURITY.md and the pages on trust name exists, and every identifier that the code raises is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "SECURITY.md", ROOT / "docs" / "invariants.md", ROOT / "docs" / "reliability.md"]
FOLDERS = ("pagedkv", "scheduler", "engine", "simulations", "tests", "benchmarks", "docs", "examples")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.]*)`", text)
    links = re.findall(r"\]\(([^)#:]+)", text)

    assert [path for path in named if not (ROOT / path).exists()] == []
    assert [path for path in links if not (page.parent / path).exists()] == []
    assert named


def test_every_invariant_that_is_raised_is_explained() -> None:
    page = (ROOT / "docs" / "invariants.md").read_text()
    explained = set(re.findall(r"\| <a id=\"i\d+\"></a>(I\d+) \|", page))
    raised = set()
    for folder in ("pagedkv", "scheduler", "simulations", "engine"):
        for path in (ROOT / folder).rglob("*.py"):
            raised |= set(re.findall(r"InvariantViolation\(\s*\"(I\d+)\"", path.read_text()))

    assert explained == {f"I{number}" for number in range(1, 17)}
    assert raised <= explained
    assert len(raised) >= 8


def test_the_pages_tell_of_every_requirement_and_figure() -> None:
    requirements = (ROOT / "docs" / "invariants.md").read_text()
    figures = (ROOT / "docs" / "reliability.md").read_text()

    assert [number for number in range(1, 14) if not re.search(rf"\| .*S{number} \|", requirements)] == []
    assert [number for number in range(1, 18) if f"| F{number} |" not in figures] == []
