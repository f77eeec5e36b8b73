"""What several files of storage tests share."""

import sys
from pathlib import Path

import pytest
import torch

# Tests are imported without a package around them; storage_contents is found beside this file.
sys.path.append(str(Path(__file__).parent))

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
