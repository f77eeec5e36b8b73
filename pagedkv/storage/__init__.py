"""The tensors that hold K/V, and the copies that make the bookkeeping's plans come true.

The one part of the core that needs torch; `pagedkv.kv_spec` computes sizes without it.
"""

try:
    # Asked for here, so that its absence is told in one sentence.
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "pagedkv.storage needs torch: in a checkout of pagedkv, pip install '.[torch]'", name="torch"
    ) from None

from pagedkv.kv_spec import KVSpec
from pagedkv.storage.files import SavedBlocks, read_saved
from pagedkv.storage.moves import BlockMoves, Moves
from pagedkv.storage.tensors import KVStorage

__all__ = ["KVSpec", "KVStorage", "BlockMoves", "Moves", "SavedBlocks", "read_saved"]
