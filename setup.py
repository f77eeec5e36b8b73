"""Compiles the C kernel into the wheel where there is a compiler; without one the wheel is pure Python.

Everything else is in pyproject.toml. A checkout and an editable install compile at first use, into the user's cache.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("pagedkv", "attention", "cpu", "kernels")
build = runpy.run_path(str(Path(__file__).parent / "attention" / "cpu" / "build.py"))


class BuildWithKernel(build_py):
    """Adds the compiled kernel beside its sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            build["compile_kernel"](Path(self.build_lib).resolve() / KERNELS / build["kernel_name"]())
            self.distribution.has_kernel = True
        except build["KernelBuildError"] as error:
            print(f"warning: the wheel has no compiled kernel: {error}", file=sys.stderr)  # noqa: T201


class WheelOfAnyPython(bdist_wheel):
    """The kernel depends on the processor and the operating system, not on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class DistributionWithKernel(Distribution):
    """Says where the wheel must be installed: among the platform's files, if it has a kernel."""

    has_kernel = False

    def has_ext_modules(self) -> bool:
        return self.has_kernel or build["can_compile"]()


setup(
    distclass=DistributionWithKernel,
    cmdclass={"build_py": BuildWithKernel, "bdist_wheel": WheelOfAnyPython},
)
