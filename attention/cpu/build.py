"""Where the compiled kernel is: shipped with the package, in the user's cache, or compiled there now."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["KernelBuildError", "cache_folder", "can_compile", "compile_kernel", "find_kernel", "kernel_name"]

SOURCES = Path(__file__).parent / "kernels"
# -fno-math-errno and -fno-trapping-math let loops with min, max and select become vectors; both keep NaN and infinity.
# -s and no unwind tables: what only profilers and C++ read is a fiftieth of the wheel's kernel.
FLAGS = (
    "-O3",
    "-s",
    "-fno-asynchronous-unwind-tables",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-pthread",
)
COMPILERS = ("cc", "gcc", "clang")
TIME_LIMIT_S = 300


class KernelBuildError(Exception):
    """The kernel could not be compiled; the message says why."""


def kernel_name() -> str:
    """The file name of the kernel for these sources, flags and processor: another source has another name.

    So a library that was left behind by an older version is never loaded.
    """
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"attention-{sys.platform}-{platform.machine()}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """The user's own cache, as the operating system places it."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pagedkv"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pagedkv"


def can_compile() -> bool:
    """Whether a C compiler is found."""
    return any(shutil.which(name) for name in COMPILERS)


def compile_kernel(target: Path) -> None:
    """Compile the kernel to `target`, which appears complete or not at all. Takes some seconds.

    Raises KernelBuildError if there is no C compiler, or if it fails.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise KernelBuildError(f"no C compiler found (looked for {', '.join(COMPILERS)})")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCES / "attention.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)  # noqa: S603
            if done.returncode != 0:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise KernelBuildError(f"{compiler} failed: {first}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{compiler} could not be run: {error}") from None


def find_kernel() -> Path:
    """The compiled kernel: the package's, else the user's cache's, else compiled into the cache. Raises KernelBuildError."""
    name = kernel_name()
    shipped = SOURCES / name
    if shipped.exists():
        return shipped
    try:
        cached = cache_folder() / name
        is_there = cached.exists()
    except (OSError, RuntimeError) as error:
        raise KernelBuildError(f"no place for the compiled kernel: {error}") from None
    if not is_there:
        compile_kernel(cached)
    # Who can write to the folder can run code in this process: it must be this user's alone.
    if hasattr(os, "getuid") and (cached.stat().st_uid != os.getuid() or cached.parent.stat().st_mode & 0o022):
        raise KernelBuildError(f"{cached.parent} can be written by other users, so {name} is not loaded from it")
    return cached
