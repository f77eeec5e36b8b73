"""vLLM's BlockPool under pagedkv's tests: `pagedkv verify vllm_block_pool:make_allocator`, run in this folder.

A BlockPool counts holders, keeps the free queue and the map from hashes to blocks; tables are its callers'. The adapter is the
least such caller: it looks up a prompt's hashes, touches what is cached, takes new blocks as tokens come, caches full blocks,
and frees a sequence's blocks in reverse. A second close frees the same blocks again, as a scheduler would that ends a request
twice. Block 0 is vLLM's null block, so block ids are one lower here. Of equal blocks vLLM caches all and hits any, so neither
hits nor the order of eviction are predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.block_pool import BlockPool

from pagedkv import OutOfBlocksError
from pagedkv.testing import Capabilities, NewSlots

GROUP = 0


@dataclass
class PoolRequest:
    """What `cache_full_blocks` reads of a request, and the request's blocks."""

    salt: bytes
    all_token_ids: list[int]
    block_hashes: list[bytes] = field(default_factory=list)
    lora_request: None = None
    blocks: list[Any] = field(default_factory=list)
    num_computed: int = 0
    is_open: bool = True

    def hash_full_blocks(self, block_size: int) -> None:
        """Chain the hashes of blocks that are full and not hashed yet."""
        for start in range(len(self.block_hashes) * block_size, len(self.all_token_ids) - block_size + 1, block_size):
            parent = self.block_hashes[-1] if self.block_hashes else self.salt
            tokens = repr(self.all_token_ids[start : start + block_size]).encode()
            self.block_hashes.append(hashlib.sha256(parent + tokens).digest())


class VllmBlockPoolAllocator:
    """A BlockPool and the requests that it has seen, open or not."""

    capabilities = Capabilities(
        forking=False, truncating=False, swapping=False, exact_hits=False, eviction="any", checks_ids=False
    )

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_gpu_blocks=num_blocks + 1, enable_caching=True, hash_block_size=block_size)
        self.requests: dict[Hashable, PoolRequest] = {}

    def open(self, sequence_id: Hashable, token_ids: Sequence[int], *, salt: bytes) -> int:
        """Touch the cached blocks of the prompt."""
        request = PoolRequest(salt, list(token_ids))
        request.blocks = self._cached_blocks(request)
        self.pool.touch(request.blocks)
        request.num_computed = len(request.blocks) * self.block_size
        self.requests[sequence_id] = request
        return request.num_computed

    def _cached_blocks(self, request: PoolRequest) -> list[Any]:
        request.hash_full_blocks(self.block_size)
        blocks = []
        for block_hash in request.block_hashes[: (len(request.all_token_ids) - 1) // self.block_size]:
            found = self.pool.get_cached_block(block_hash, [GROUP])
            if found is None:
                break
            blocks += found
        return blocks

    def extend(self, sequence_id: Hashable, token_ids: Sequence[int]) -> None:
        """Sampled tokens."""
        self.requests[sequence_id].all_token_ids += token_ids

    def append(self, sequence_id: Hashable, num_tokens: int) -> NewSlots:
        """Take new blocks, and cache those that are full."""
        request, size = self.requests[sequence_id], self.block_size
        start, stop = request.num_computed, request.num_computed + num_tokens
        num_new = max(0, -(-stop // size) - len(request.blocks))
        if num_new > self.num_free():
            raise OutOfBlocksError(num_new, self.num_free())
        request.blocks += self.pool.get_new_blocks(num_new)
        request.num_computed = stop
        request.hash_full_blocks(size)
        self.pool.cache_full_blocks(
            request=request,
            blocks=request.blocks,
            num_cached_blocks=start // size,
            num_full_blocks=stop // size,
            block_size=size,
            kv_cache_group_id=GROUP,
        )
        table = self.block_table(sequence_id)
        return NewSlots([table[position // size] * size + position % size for position in range(start, stop)])

    def close(self, sequence_id: Hashable) -> None:
        """Free the blocks, the deepest first. The request is kept, so that a second close reaches the pool."""
        request = self.requests[sequence_id]
        self.pool.free_blocks(reversed(request.blocks))
        request.is_open = False

    def lookup(self, token_ids: Sequence[int], *, salt: bytes) -> int:
        """Count what `open` would touch."""
        return len(self._cached_blocks(PoolRequest(salt, list(token_ids)))) * self.block_size

    def block_table(self, sequence_id: Hashable) -> Sequence[int]:
        """The request's blocks."""
        request = self.requests[sequence_id]
        return [block.block_id - 1 for block in request.blocks] if request.is_open else []

    def num_free(self) -> int:
        """Cached blocks without a holder are among the free ones."""
        return int(self.pool.get_num_free_blocks())

    def num_free_host(self) -> int:
        """There is no host pool."""
        return 0


def make_allocator(num_blocks: int, block_size: int, _num_host_blocks: int) -> VllmBlockPoolAllocator:
    """The factory that `pagedkv verify` calls."""
    return VllmBlockPoolAllocator(num_blocks, block_size)
