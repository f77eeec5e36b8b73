"""S6, S10: the library opens no socket, starts no process, unpickles nothing and writes no file unasked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pagedkv", "scheduler", "attention", "engine", "simulations")
# What could reach the network or run data as code, beyond the modules that tests/architecture/test_layering.py bans.
MODULES = {
    "asyncio.subprocess",
    "code",
    "codeop",
    "ftplib",
    "http",
    "imaplib",
    "multiprocessing",
    "poplib",
    "pty",
    "runpy",
    "smtplib",
    "socketserver",
    "ssl",
    "telnetlib",
    "urllib",
    "webbrowser",
    "xmlrpc",
    "yaml",
}
ATTRIBUTES = {
    "create_connection",
    "create_server",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "create_unix_server",
    "load_module",
    "open_connection",
    "popen",
    "start_server",
    "start_unix_server",
    "system",
    "unsafe_load",
}
LOADERS = {"joblib", "np", "numpy", "pickle", "torch"}
"""`x.load` of these may run what it reads."""


def sources() -> list[Path]:
    found = {path.resolve() for part in PARTS for path in (ROOT / part).rglob("*.py")}
    return sorted(found)


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"import {name}" for name in names if name in MODULES or name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in ATTRIBUTES or (node.func.attr in ("load", "loads") and owner in LOADERS):
                found.append(f"{owner}.{node.func.attr}()")
            found += [
                f"{node.func.attr}({word.arg}={word.value.value})"
                for word in node.keywords
                if word.arg in ("allow_pickle", "shell", "trust_remote_code")
                and isinstance(word.value, ast.Constant)
                and word.value.value
            ]
    return found


def test_no_source_can_reach_out_or_run_what_it_reads() -> None:
    paths = sources()

    assert [f"{path}: {found}" for path in paths for found in offences(ast.parse(path.read_text()))] == []
    assert len(paths) > 100


@pytest.mark.parametrize(
    "planted",
    [
        "import urllib.request",
        "from http import server",
        "import torch\ntorch.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "os.system('x')",
        "asyncio.start_server(handle, port=1)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_lint_sees_what_is_planted(planted: str) -> None:
    assert offences(ast.parse(planted))


def test_no_source_asserts() -> None:
    """`python -O` drops assertions, so no input and no invariant may hang on one."""
    found = [
        f"{path}:{node.lineno}"
        for path in sources()
        if "testing" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]

    assert found == []


def test_importing_replaying_and_recording_touch_nothing_outside(run_script) -> None:
    assert run_script("script_audit.py") == "\n"


def test_the_watch_sees_a_socket(run_script, tmp_path) -> None:
    script = (Path(__file__).parent / "script_audit.py").read_text()
    planted = tmp_path / "planted.py"
    planted.write_text(
        script.replace("sys.addaudithook(watch)", "sys.addaudithook(watch)\nimport socket; socket.socket()")
    )

    assert "socket.__new__" in run_script(str(planted))
