"""The command as a user meets it, in a process of its own or, for a fifth of the time, in this one."""

from __future__ import annotations

import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess, run
from unittest.mock import patch

from pagedkv.__main__ import main


def run_apart(*arguments: object, cwd: Path) -> CompletedProcess[str]:
    """As from a shell."""
    command = [sys.executable, "-m", "pagedkv", *map(str, arguments)]
    return run(command, capture_output=True, text=True, cwd=cwd, check=False)


def run_here(*arguments: object, cwd: Path) -> CompletedProcess[str]:
    """The same in this process: what it prints, and the code that it exits with."""
    command = ["pagedkv", *map(str, arguments)]
    out, errors, code = StringIO(), StringIO(), 0
    with chdir(cwd), redirect_stdout(out), redirect_stderr(errors), patch.object(sys, "argv", command):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(command, code, out.getvalue(), errors.getvalue())
