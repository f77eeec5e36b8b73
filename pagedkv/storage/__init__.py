"""The tensors that hold K/V, and the copies that make the bookkeeping's plans come true.

The one part of the core that needs torch; `pagedkv.kv_spec` computes sizes without it.
"""

try:
    # Asked for here, so that their absence is told in one sentence.
    import safetensors  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("torch", "safetensors"):
        raise
    raise ModuleNotFoundError(
        f"pagedkv.storage needs {error.name}: pip install 'pagedkv[torch]'", name=error.name
    ) from None

from pagedkv.kv_spec import KVSpec
from pagedkv.storage.files import SavedBlocks, read_saved
from pagedkv.storage.moves import BlockMoves, Moves
from pagedkv.storage.tensors import KVStorage

__all__ = ["KVSpec", "KVStorage", "BlockMoves", "Moves", "SavedBlocks", "read_saved"]
