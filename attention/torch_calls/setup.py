"""What follows from the shapes and dtypes of a call, and how its keys and values are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall
from pagedkv.attention.formats import CacheFormat, format_of
from pagedkv.attention.torch_calls.key_pieces import Int64s, KeyPieces

__all__ = ["Setup", "pieces_of", "read"]

# Keys of one chunk, and values of one chunk: each at most this large. Both fit in the last-level cache of a server's
# processor, next to what else is there.
CHUNK_BYTES = 4 << 20
CHUNK_TOKENS = (256, 16384)


@dataclass(frozen=True, slots=True)
class Setup:
    """What follows from shapes and dtypes.

    dtype:     of queries, keys and values when they are attended; results are added up in `wide_dtype`
    is_manual: scores are made by hand
    is_latent: the values are the first channels of the keys (MLA), so they are read once
    right:     keys seen after one's own position, 0 if causal, -1 for all
    workspace: (2, bytes) for the keys and the values of a chunk
    """

    num_kv_heads: int
    group: int
    value_dim: int
    dtype: torch.dtype
    is_manual: bool
    is_latent: bool
    right: int
    chunk_tokens: int
    workspace: Tensor

    @staticmethod
    def of(call: AttentionCall) -> Setup:
        keys, values = call.key_cache, call.value_cache
        num_kv_heads = keys.shape[2]
        value_dim = values.shape[3] * (2 if format_of(values.dtype) is CacheFormat.INT4 else 1)
        is_manual = call.softcap > 0 or call.query.device.type != "cpu"
        # torch's CPU kernel is 4.5 times slower in float16 than in float32 where the processor has no float16 arithmetic.
        keeps_dtype = call.query.dtype == torch.float64 or (keys.dtype == torch.bfloat16 and not is_manual)
        dtype = call.query.dtype if keeps_dtype else torch.float32
        token_bytes = num_kv_heads * max(call.query.shape[2], value_dim) * dtype.itemsize
        chunk_tokens = min(max(CHUNK_BYTES // token_bytes, CHUNK_TOKENS[0]), CHUNK_TOKENS[1])
        stored_bytes = num_kv_heads * max(keys.shape[3], values.shape[3]) * keys.dtype.itemsize
        return Setup(
            num_kv_heads=num_kv_heads,
            group=call.query.shape[1] // num_kv_heads,
            value_dim=value_dim,
            dtype=dtype,
            is_manual=is_manual,
            is_latent=keys.data_ptr() == values.data_ptr()
            and keys.stride() == values.stride()
            and keys.shape[3] >= values.shape[3]
            and call.k_scale is None
            and call.v_scale is None,
            right=0 if call.causal else call.window_right,
            chunk_tokens=chunk_tokens,
            workspace=torch.empty((2, chunk_tokens * stored_bytes), dtype=torch.uint8, device=keys.device),
        )

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of what is added up over chunks."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def pieces_of(call: AttentionCall, seqs: Int64s, firsts: Int64s, sizes: Int64s) -> KeyPieces:
    return KeyPieces.of(call.block_tables, call.key_cache.shape[1], seqs, firsts, sizes)


def read(call: AttentionCall, setup: Setup, keys: KeyPieces) -> tuple[Tensor, Tensor]:
    """Keys and values: (pieces, kv_heads, keys, dim) each."""
    key = keys.read(call.key_cache, call.k_scale, setup.dtype, setup.workspace[0])
    if setup.is_latent:
        return key, key[..., : setup.value_dim] if setup.is_manual else key
    return key, keys.read(call.value_cache, call.v_scale, setup.dtype, setup.workspace[1])
