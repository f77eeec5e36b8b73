"""Mutants that nobody could tell from the original, found by hand among the survivors of `mutation.py`."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

POOL, CACHE, EVICTION = "pagedkv/block_pool.py", "pagedkv/prefix_cache.py", "pagedkv/eviction"

# (file, its line, change) -> why nobody could tell.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        POOL,
        "self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # A stack: the next block out is the last one.",
        "1 -> 2",
    ): "one more entry above the top of the stack, which is never read before it is written",
    (
        POOL,
        "if num_blocks.__class__ is not int or num_blocks < 0:",
        "num_blocks < 0 -> num_blocks <= 0",
    ): "0 is then looked at by as_int, which takes it",
    (
        POOL,
        "if num_blocks.__class__ is not int or num_blocks < 0:",
        "0 -> 1",
    ): "0 is then looked at by as_int, which takes it",
    (
        POOL,
        "if num <= 128:  # Python's own containers beat array operations on few ids.",
        "128 -> 129",
    ): "both ways of looking at ids find the same, at another price",
    (
        POOL,
        "if num <= 128:  # Python's own containers beat array operations on few ids.",
        "num <= 128 -> num < 128",
    ): "both ways of looking at ids find the same, at another price",
    (
        POOL,
        "num_distinct = num - int(np.count_nonzero(ordered[1:] == ordered[:-1]))",
        "num - int(np.count_nonzero(ordered[1:] == ordered[:-1])) -> num + int(np.count_nonzero(ordered[1:] == ordered[:-1]))",
    ): "only compared with num: too many are as unequal to it as too few",
    (POOL, "return block_ids.astype(np.int64, copy=False)", "False -> True"): "a copy of ids that nobody writes to",
    (
        CACHE,
        "low, high = 1, num_keys - 1  # keys[low - 1] is resident, keys[high] is not.",
        "num_keys - 1 -> num_keys + 1",
    ): "the search looks at keys up to the last one, which is known not to be resident",
    (
        CACHE,
        "middle = (low + high + 1) // 2",
        "1 -> 2",
    ): "still behind low and at most high, so only the order of looks differs",
    (
        CACHE,
        "self._block_of.update(zip(keys, block_ids.tolist(), strict=True))",
        "True -> False",
    ): "every caller has one key for each block",
    (
        CACHE,
        "keys = [key for key, new in zip(keys, is_new.tolist(), strict=True) if new]",
        "True -> False",
    ): "is_new was made of as many keys",
    (
        CACHE,
        "for key, block_id in zip(keys, block_ids.tolist(), strict=True):",
        "True -> False",
    ): "every caller has one key for each block",
    (
        f"{EVICTION}/lru.py",
        "width = 2 * num_blocks + 16",
        "16 -> 17",
    ): "how far the first look goes; a further one follows",
    (f"{EVICTION}/s3fifo.py", "self._next_number += 1", "1 -> 2"): "numbers are only compared with each other",
    (
        f"{EVICTION}/fifo.py",
        "self._leaves.discard(block_ids)",
        "self._leaves.discard(block_ids) -> pass",
    ): "an entry of a block that lost its name is passed over anyway: the block may not go, or has a new number",
    (f"{EVICTION}/leaf_first.py", "self._next_number = 0", "0 -> 1"): "numbers are only compared with each other",
    (
        f"{EVICTION}/prefix_tree.py",
        "self._set_tables(np.full(num_blocks + 1, HELD, np.int32), np.full(num_blocks, UNNAMED, np.int32))",
        "1 -> 2",
    ): "one more place behind the last, which nobody reads",
    (
        f"{EVICTION}/prefix_tree.py",
        "if np.any(blockers[held_parents[held_parents != ROOT]] < HELD):",
        "blockers[held_parents[held_parents != ROOT]] < HELD -> blockers[held_parents[held_parents != ROOT]] <= HELD",
    ): "a parent counts its child, as was checked before, so that its blockers are not exactly HELD",
    (
        "pagedkv/scheduler/ending.py",
        "at_stop = [token in sample.request.stop_token_ids for sample, token in zip(samples, tokens, strict=True)]",
        "True -> False",
    ): "each row has one last token",
    (
        "pagedkv/scheduler/kinds.py",
        "NUM_BUCKETS = 4096",
        "4096 -> 4097",
    ): "tokens of one bucket are told apart by each sample's own stop tokens",
    (
        "pagedkv/scheduler/rollback.py",
        "num_valid = dict(zip(rows.tolist(), starts.tolist(), strict=True))",
        "True -> False",
    ): "a step has one start for each row",
    (
        "pagedkv/scheduler/admission.py",
        "sample.row = -1",
        "1 -> 2",
    ): "whoever asks for the row asks whether it is below 0",
    (
        "pagedkv/scheduler/shortage.py",
        "sample.row = -1",
        "1 -> 2",
    ): "whoever asks for the row asks whether it is below 0",
}
