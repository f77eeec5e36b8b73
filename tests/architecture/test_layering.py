"""Who may import whom: one table, held against every import in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = set(sys.stdlib_module_names)

# Part -> what it may import beside the standard library and itself; "core" are the files of pagedkv/ itself but for
# storage, the one of them that needs torch. Extras of [sim] are named by the part that uses them.
MAY_IMPORT = {
    "core": {"numpy", "sortedcontainers"},
    "storage": {"numpy", "torch", "safetensors", "pagedkv.core"},
    "scheduler": {"numpy", "sortedcontainers", "pagedkv.core"},
    "attention": {"numpy", "torch", "triton", "pagedkv.errors"},
    "testing": {"numpy", "hypothesis", "pytest", "pagedkv.core", "pagedkv.scheduler"},
    "simulations": {
        "numpy",
        "msgspec",
        "plotly",
        "rich",
        "typer",
        "pagedkv.core",
        "pagedkv.scheduler",
        "pagedkv.testing",
    },
    "engine": {
        "numpy",
        "prometheus_client",
        "torch",
        "tqdm",
        "transformers",
        "pagedkv.core",
        "pagedkv.scheduler",
        "pagedkv.attention",
        "pagedkv.storage",
    },
}
FOLDERS = {part: part for part in MAY_IMPORT} | {
    "core": "pagedkv",
    "storage": "pagedkv/storage",
    "testing": "pagedkv/testing",
}
# The command's entry point is the one file of pagedkv/ that reaches up; nothing imports it.
ENTRY_POINT = ROOT / "pagedkv" / "__main__.py"


def files_of(part: str) -> list[Path]:
    folder = ROOT / FOLDERS[part]
    own = [path for path in folder.rglob("*.py") if path != ENTRY_POINT]
    if part == "core":
        links = [path for path in folder.iterdir() if path.is_symlink()]
        others = [*links, ROOT / FOLDERS["storage"], ROOT / FOLDERS["testing"]]
        own = [path for path in own if not any(other in path.parents for other in others)]
    return sorted(own)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def part_of(module: str) -> str:
    names = module.split(".")
    if names[0] != "pagedkv":
        return names[0]
    if names[1:2] == ["errors"]:
        return "pagedkv.errors"
    return f"pagedkv.{names[1]}" if len(names) > 1 and names[1] in MAY_IMPORT else "pagedkv.core"


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_the_table_allows(part: str) -> None:
    allowed = MAY_IMPORT[part] | {f"pagedkv.{part}"}
    if "pagedkv.core" in allowed:
        allowed |= {"pagedkv.errors"}

    forbidden = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files_of(part)
        for module in imports_of(path)
        if part_of(module) not in allowed and part_of(module) not in STDLIB
    ]

    assert forbidden == []


def test_every_part_with_code_was_looked_at() -> None:
    assert {part: bool(files_of(part)) for part in ("core", "storage", "scheduler", "attention", "simulations")} == {
        "attention": True,
        "core": True,
        "storage": True,
        "scheduler": True,
        "simulations": True,
    }


@pytest.mark.parametrize(
    "module", ["pagedkv", "pagedkv.scheduler", "pagedkv.simulations.replay", "pagedkv.simulations.cli"]
)
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_takes_less_than_a_fifth_of_a_second_beyond_numpy() -> None:
    code = "import numpy, time; t = time.process_time(); from pagedkv import KVCacheManager; print(time.process_time() - t)"

    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )

    assert seconds < 0.2


def test_nothing_reads_a_clock_or_unseeded_randomness_below_the_loop() -> None:
    banned = {"time", "random", "datetime", "secrets", "uuid"}
    parts = ("core", "storage", "scheduler")

    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for part in parts
        for path in files_of(part)
        for module in imports_of(path)
        if module.split(".")[0] in banned
    ]

    assert found == []


def test_no_code_can_execute_data() -> None:
    banned_modules = {"pickle", "shelve", "marshal", "socket", "subprocess", "ctypes"}
    banned_calls = {"eval", "exec", "__import__", "compile"}
    # The C kernel of our own sources is compiled and loaded here, and nothing else anywhere.
    allowed = {("build.py", "subprocess"), ("library.py", "ctypes")}
    kernel = ROOT / "attention" / "cpu"
    found = []
    for part in MAY_IMPORT:
        for path in files_of(part):
            found += [
                f"{path.name}: {module}"
                for module in imports_of(path)
                if module.split(".")[0] in banned_modules
                and not (path.parent == kernel and (path.name, module) in allowed)
            ]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned_calls:
                    found.append(f"{path.name}: {node.func.id}()")

    assert found == []
