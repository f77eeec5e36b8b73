"""What several files of memory tests share."""

import sys
from pathlib import Path

import pytest

from pagedkv import CacheConfig, KVCacheManager

# Tests are imported without a package around them; memory_model and memory_machine are found beside this file.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def manager() -> KVCacheManager:
    """Six blocks of two tokens, four blocks on the host."""
    return KVCacheManager(CacheConfig(num_blocks=6, block_size=2, num_host_blocks=4))
