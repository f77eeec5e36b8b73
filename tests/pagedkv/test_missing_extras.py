"""Whoever lacks an extra is told which, in one sentence; any other module that is missing is named as Python names it."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from types import ModuleType

import pytest

import pagedkv
from pagedkv.__main__ import main


def command_that_misses(name: str) -> ModuleType:
    """A stand-in for the command's module, which finds one of the modules that it needs missing."""

    def run() -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    module = ModuleType("pagedkv.simulations.cli")
    module.main = run
    return module


def test_the_command_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pagedkv.simulations.cli", command_that_misses("typer"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: the pagedkv command needs typer: in a checkout of pagedkv, pip install '.[sim]'\n"
    )


def test_the_command_blames_no_extra_for_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pagedkv.simulations.cli", command_that_misses("my_plugin"))
    with pytest.raises(ModuleNotFoundError, match="my_plugin"):
        main()


class BrokenModule:
    """An importer under which one module is there, but lacks a module that it needs itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == self.name:
            raise ModuleNotFoundError("No module named 'its_own_need'", name="its_own_need")


def import_storage() -> None:
    spec = importlib.util.find_spec("pagedkv")
    runpy.run_path(f"{spec.submodule_search_locations[0]}/storage/__init__.py")


def test_storage_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"^pagedkv\.storage needs torch: in a checkout of pagedkv, pip install '\.\[torch\]'$",
    ):
        import_storage()


def test_storage_blames_no_extra_for_a_module_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [BrokenModule("torch"), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="its_own_need"):
        import_storage()


def test_the_names_of_the_package_can_be_listed_and_others_are_refused() -> None:
    assert set(pagedkv.__all__) <= set(dir(pagedkv))
    with pytest.raises(AttributeError, match="module 'pagedkv' has no attribute 'missing'"):
        pagedkv.missing  # noqa: B018 - the look-up raises
