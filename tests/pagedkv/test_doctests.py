import doctest
import importlib
import pkgutil

import pytest

import pagedkv
from pagedkv import eviction

MODULES = sorted(
    module.name
    for package in (pagedkv, eviction)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.ispkg
    and module.name != "pagedkv.storage"  # It needs torch, which this part of the tests does without.
)


def test_the_core_modules_are_found() -> None:
    assert {"pagedkv.arrays", "pagedkv.block_pool", "pagedkv.manager", "pagedkv.eviction.lru"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
