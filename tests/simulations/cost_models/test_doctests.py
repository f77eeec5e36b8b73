import doctest
import importlib
import pkgutil

import pytest

from pagedkv.simulations import cost_models

MODULES = sorted(
    module.name for module in pkgutil.iter_modules(cost_models.__path__, "pagedkv.simulations.cost_models.")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
