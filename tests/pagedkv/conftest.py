"""Fixtures that several files of memory tests share."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from pagedkv import CacheConfig, KVCacheManager


def _load_memory_machine() -> ModuleType:
    # Tests are imported without a package to import from, so what they share is loaded from its file.
    name = "pagedkv_tests_memory_machine"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("memory_machine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEMORY_MACHINE = _load_memory_machine()


@pytest.fixture(scope="session")
def memory_machine() -> ModuleType:
    """The module with the model of the memory and the state machine that compares both."""
    return MEMORY_MACHINE


@pytest.fixture(scope="session")
def digest() -> Callable[[KVCacheManager], dict[str, object]]:
    """A function that writes down all that a manager knows, to compare before and after."""
    return MEMORY_MACHINE.digest


@pytest.fixture
def manager() -> KVCacheManager:
    """Six blocks of two tokens, four blocks on the host."""
    return KVCacheManager(CacheConfig(num_blocks=6, block_size=2, num_host_blocks=4))
