"""Which full block has which name: the map from block keys to blocks, and the longest resident prefix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import BlockIds
from pagedkv.block_keys import Key
from pagedkv.block_pool import BlockPool
from pagedkv.errors import InvariantViolation

__all__ = ["PrefixCache"]

NO_PARENT = -1


class PrefixCache:
    """Names full blocks of a pool. A key stands for a whole prefix, so it names one block, and a block has one key.

    *Ancestors outlive descendants.* A block is named only by a sequence whose own blocks before it are the named ones,
    so whoever holds a named block holds all of its ancestors, and policies evict tails before heads. The resident keys
    of a chain are therefore always a prefix of it, and the longest hit is found by binary search.

    *Duplicates.* Two sequences that computed the same block independently keep their own; the map names the first.
    The other sequence names nothing further: its blocks would hang from a head that it does not hold.

    *Contradictions.* Keys of real tokens are hashes of their whole prefix; simulated ids are what somebody says, and may
    come after two different prefixes. A hit then ends before what is not there, and, where the policy knows the parents of
    blocks, before the first that continues another block: its holder would not hold its ancestors.
    """

    __slots__ = ("_block_of", "_key_of", "_parent_of", "_pool")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_of: dict[Key, int] = {}
        # The key of a block that has lost its name stays until another overwrites it: the pool knows who is named.
        self._key_of = np.empty(pool.num_blocks, object)
        # As `_key_of`; only kept for policies that track names.
        self._parent_of = np.empty(pool.num_blocks if pool.policy.tracks_names else 0, np.int64)
        pool.on_evict = self._forget

    def __len__(self) -> int:
        """Number of named blocks. O(1)."""
        return len(self._block_of)

    @property
    def tracks_names(self) -> bool:
        """Whether the eviction policy must be told of names and parents. O(1)."""
        return self._pool.policy.tracks_names

    def num_resident(self, keys: Sequence[Key], num_keys: int) -> int:
        """Length of the longest resident prefix of `keys[:num_keys]`, in blocks. O(log num_keys), pins nothing."""
        block_of = self._block_of
        if num_keys == 0 or keys[0] not in block_of:
            return 0
        if keys[num_keys - 1] in block_of:
            return num_keys
        low, high = 1, num_keys - 1  # keys[low - 1] is resident, keys[high] is not.
        while low < high:
            middle = (low + high + 1) // 2
            if keys[middle - 1] in block_of:
                low = middle
            else:
                high = middle - 1
        return low

    def blocks(self, keys: Sequence[Key], num_keys: int) -> BlockIds:
        """Blocks of the first `num_keys` keys, as many as `num_resident` found, (num_keys,) int64. O(num_keys).

        They are fewer where simulated ids contradict each other.
        """
        first = keys if len(keys) == num_keys else keys[:num_keys]
        try:
            block_ids = np.array(list(map(self._block_of.__getitem__, first)), np.int64)
        except KeyError:
            resident = takewhile(self._block_of.__contains__, first)
            block_ids = np.array([self._block_of[key] for key in resident], np.int64)
        if self.tracks_names and len(block_ids) and isinstance(first[0], int):
            return self._first_chain(block_ids)
        return block_ids

    def _first_chain(self, block_ids: BlockIds) -> BlockIds:
        """The first of these blocks that continue each other, from the start of a prompt on. O(n)."""
        parent_ids = self._parent_of[block_ids]
        if parent_ids.item(0) != NO_PARENT:
            return block_ids[:0]
        # As good as always all of them do; bytes tell at half the cost of comparing arrays.
        if parent_ids[1:].tobytes() == block_ids[:-1].tobytes():
            return block_ids
        return block_ids[: int((parent_ids[1:] != block_ids[:-1]).argmax()) + 1]

    def name_chain(self, keys: Sequence[Key], block_ids: BlockIds, parent_id: int) -> int:
        """Name a run of held blocks, the first continuing `parent_id` (-1: none), up to the first key that names another.

        Returns how many were named. If the first key names another block, the run is a duplicate and none is; a later
        key can be resident only where simulated ids contradict each other (one id after two different prefixes). O(n).
        """
        if not self._block_of.keys().isdisjoint(keys):
            keys = keys[: next(i for i, key in enumerate(keys) if key in self._block_of)]
            block_ids = block_ids[: len(keys)]
            if not len(keys):
                return 0
        parent_ids = block_ids
        if self._pool.policy.tracks_names:
            parent_ids = np.concatenate((np.array([parent_id], np.int64), block_ids[:-1]))
        self.name_fresh(list(keys), block_ids, parent_ids)
        return len(keys)

    def name_fresh(self, keys: list[Key], block_ids: BlockIds, parent_ids: BlockIds) -> None:
        """Name held blocks; `block_ids[i]` continues `parent_ids[i]` (-1: none), and no key names a block yet. O(n)."""
        try:
            self._block_of.update(zip(keys, block_ids.tolist(), strict=True))
        except MemoryError:
            self._take_back(keys, block_ids)
            raise
        self._key_of[block_ids] = keys
        self._pool.name(block_ids)
        if self._pool.policy.tracks_names:
            self._parent_of[block_ids] = parent_ids
            self._pool.policy.on_name(block_ids, keys, parent_ids)

    def name_each(self, keys: list[Key], block_ids: BlockIds, parent_ids: BlockIds) -> NDArray[np.bool_]:
        """Name held blocks of different sequences, one each; a key that names another block already stays with that.

        Returns which were named, (n,) bool. O(n).
        """
        try:
            owners = np.array(list(map(self._block_of.setdefault, keys, block_ids.tolist())), np.int64)
        except MemoryError:
            self._take_back(keys, block_ids)
            raise
        is_new: NDArray[np.bool_] = owners == block_ids
        if not is_new.all():
            keys = [key for key, new in zip(keys, is_new.tolist(), strict=True) if new]
            block_ids, parent_ids = block_ids[is_new], parent_ids[is_new]
        self._key_of[block_ids] = keys
        self._pool.name(block_ids)
        if self._pool.policy.tracks_names:
            self._parent_of[block_ids] = parent_ids
            self._pool.policy.on_name(block_ids, keys, parent_ids)
        return is_new

    def key_of(self, block_id: int) -> Key | None:
        """The name of a block, or None. O(1)."""
        key: Key | None = self._key_of[block_id] if self._pool.has_name(block_id) else None
        return key

    def keys_of(self, block_ids: BlockIds) -> list[Key | None]:
        """The name of each block, None where it has none. O(n)."""
        keys, are_named = self._key_of[block_ids].tolist(), self._pool.is_named(block_ids).tolist()
        return [key if is_named else None for key, is_named in zip(keys, are_named, strict=True)]

    def unname(self, block_ids: BlockIds) -> None:
        """Forget the names of these named blocks; the caller makes sure that nothing named continues them. O(n)."""
        self._forget(block_ids)
        self._pool.unname(block_ids)

    def clear(self) -> None:
        """Forget every name. O(named blocks)."""
        if self._block_of:
            self.unname(np.fromiter(self._block_of.values(), np.int64, len(self._block_of)))

    def check_invariants(self) -> None:
        """Compare map and blocks in both directions (I3). O(num_blocks)."""
        all_ids = np.arange(self._pool.num_blocks, dtype=np.int64)
        named = np.flatnonzero(self._pool.is_named(all_ids)).tolist()
        if len(named) != len(self._block_of):
            raise InvariantViolation("I3", f"{len(self._block_of)} keys for {len(named)} named blocks")
        for block_id in named:
            if self._block_of.get(self._key_of[block_id]) != block_id:
                raise InvariantViolation("I3", f"block {block_id} has a key that names another block")

    def check_block(self, block_id: int) -> None:
        """Compare map and one block (I3). O(1)."""
        key = self.key_of(block_id)
        if key is not None and self._block_of.get(key) != block_id:
            raise InvariantViolation("I3", f"block {block_id} has a key that names another block")

    def _take_back(self, keys: list[Key], block_ids: BlockIds) -> None:
        """There was memory for the names of only some of these blocks, none of which had a name before."""
        for key, block_id in zip(keys, block_ids.tolist(), strict=True):
            if self._block_of.get(key) == block_id:
                del self._block_of[key]

    def _forget(self, block_ids: BlockIds) -> None:
        block_of = self._block_of
        for key in self._key_of[block_ids].tolist():
            del block_of[key]
