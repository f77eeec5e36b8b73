"""Prints the last block key of a handful of sequences, as JSON."""

import json

from pagedkv import CacheConfig, CacheIdentity, ExtraKey, KVCacheManager

TOKENS = (1, 2, 3, 4, 5, 6)
NOTHING = CacheIdentity()
VECTORS = {
    "plain": (NOTHING, 2, TOKENS, {}),
    "blocks of 3": (NOTHING, 3, TOKENS, {}),
    "large tokens": (NOTHING, 2, (0, 2**31 - 1, 256, 65536), {}),
    "salt": (NOTHING, 2, TOKENS, {"salt": b"tenant-a"}),
    "salt of 64 bytes": (NOTHING, 2, TOKENS, {"salt": bytes(range(64))}),
    "adapter": (NOTHING, 2, TOKENS, {"adapter": "lora-é"}),
    "empty adapter": (NOTHING, 2, TOKENS, {"adapter": ""}),
    "model": (CacheIdentity("llama", "bfloat16"), 2, TOKENS, {}),
    "items": (NOTHING, 2, TOKENS, {"extras": (ExtraKey(1, 5, b"image"), ExtraKey(5, 6, b"\0"))}),
    "everything": (
        CacheIdentity("llama", "fp8"),
        1,
        TOKENS,
        {"salt": b"\0s", "adapter": "a", "extras": [ExtraKey(0, 6, b"x")]},
    ),
}


def last_key(identity, block_size, tokens, options):
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=block_size, identity=identity))
    manager.open("a", tokens, **options)
    manager.append("a", len(tokens))
    return manager.memory.cache.key_of(int(manager.block_table("a")[-1])).hex()


print(json.dumps({name: last_key(*vector) for name, vector in VECTORS.items()}))
