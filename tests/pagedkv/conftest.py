"""What several files of memory tests share."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from pagedkv import CacheConfig, KVCacheManager

# Tests are imported without a package around them; memory_model and memory_machine are found beside this file.
sys.path.append(str(Path(__file__).parent))

# The same examples in every run, however busy the machine.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture
def manager() -> KVCacheManager:
    """Six blocks of two tokens, four blocks on the host."""
    return KVCacheManager(CacheConfig(num_blocks=6, block_size=2, num_host_blocks=4))
