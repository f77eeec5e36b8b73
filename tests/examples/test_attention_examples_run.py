"""Every attention example runs as a script and says something."""

import runpy
from pathlib import Path

import pytest
from attention_examples import FOLDER

PATHS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_example_prints_a_few_lines_without_nan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")

    printed = capsys.readouterr().out
    assert 1 <= len(printed.splitlines()) <= 10
    assert "nan" not in printed


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_page_on_variants_names_the_example(path: Path) -> None:
    assert f"../examples/attention/{path.name}" in (FOLDER.parents[1] / "docs" / "attention_variants.md").read_text()
