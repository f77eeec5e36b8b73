"""What the documents show is what happens."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])


def python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_the_embedding_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code, shown = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL)[0]

    assert python(code, tmp_path) == shown
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_attention_example_prints_what_its_page_says(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(), re.DOTALL)[0]
    shown = re.findall(r"# (\(.*\))$", code, re.MULTILINE)

    assert python(code, tmp_path).splitlines() == shown
    assert shown


def test_the_known_bad_allocator_breaks_as_its_page_shows() -> None:
    page = (ROOT / "docs" / "testing_allocators.md").read_text()
    command, shown = re.findall(r"`pagedkv (verify [^`]*Copies[^`]*)`[^`]*```text\n(.*?)```", page, re.DOTALL)[0]

    result = subprocess.run(
        [sys.executable, "-m", "pagedkv", *command.split()], capture_output=True, text=True, check=False, cwd=ROOT
    )

    assert result.stdout == shown
    assert result.returncode == 1


def test_the_capacity_example_prints_what_its_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cost_models.md").read_text()
    code = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "blocks_each" in code)

    assert python(code, tmp_path) == "".join(f"{shown}\n" for shown in re.findall(r"print\(.*\)  # (.*)", code))


@pytest.mark.parametrize(
    "name",
    [
        "recorded_runs.md",
        "embedding.md",
        "storage.md",
        "serving_metrics.md",
        "speculative_decoding.md",
        "traces.md",
        "eviction.md",
        "metrics.md",
    ],
)
def test_the_examples_of_a_page_run_and_print_what_it_says(tmp_path: Path, name: str) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL))
    shown = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)

    printed = python(code, tmp_path).splitlines()

    assert [line for line in shown if line not in printed] == []


def test_the_api_page_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)

    assert (ROOT / "docs" / "api.md").read_text() == make_api.api_page(), "run: python docs/make_api.py"


# The server runs until it is stopped: tests/examples/test_openai_server.py starts it.
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "openai_server.py"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(tmp_path: Path, path: Path) -> None:
    result = subprocess.run([sys.executable, str(path)], input=b"", capture_output=True, cwd=tmp_path, check=True)

    assert result.stderr == b""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())

    assert [target for target in targets if not (path.parent / target).exists()] == []


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in headings} | set(re.findall(r'id="([^"]+)"', text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_sections_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text())

    assert [
        f"{page}#{anchor}" for page, anchor in links if anchor not in anchors_of(path.parent / page if page else path)
    ] == []


def test_the_readme_names_targets_that_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_package_is_found_from_the_folder_above_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "pagedkv" / "pagedkv").mkdir(parents=True)
    (tmp_path / "example.py").write_text("from pagedkv import KVCacheManager\nprint(KVCacheManager.__name__)\n")

    result = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert result.stdout == "KVCacheManager\n"
