"""How large the K/V of a model is: arithmetic on its shape, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pagedkv.arrays import as_int, cdiv, keep_int, shown
from pagedkv.config import MAX_BLOCK_SIZE
from pagedkv.errors import ConfigError, InvalidArgumentError

__all__ = ["ALIGNMENT", "BITS_PER_ELEMENT", "KVPart", "KVSpec", "int4_group_size"]

BITS_PER_ELEMENT = {
    "float64": 64,
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "int8": 8,
    "int4": 4,
}
"""Every element type that a cache may have: torch's names, and "int4", which torch holds in pairs as uint8."""

ALIGNMENT = 16
"""Bytes: every part of a block starts at a multiple, so that kernels may load 16 bytes at once."""

MAX_LAYERS = 2**16
MAX_HEADS = 2**16
MAX_DIM = 2**16


def int4_group_size(dim: int) -> int:
    """Channels that share a step and a minimum: 32, or 16 where 32 does not divide, or else all of them.

    >>> int4_group_size(128), int4_group_size(80), int4_group_size(10)
    (32, 16, 10)
    """
    return next((size for size in (32, 16) if dim % size == 0), dim)


class KVPart(NamedTuple):
    """One of a layer's tensors within a block: "key", "value", "k_scale" or "v_scale".

    offset: bytes from the start of the layer's share of the block; bytes_per_head: of one token and head
    """

    name: str
    offset: int
    bytes_per_head: int


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape of a model's K/V, and of the blocks that hold it.

    `dtype` is a key of `BITS_PER_ELEMENT`. `value_dim` is `head_dim` unless given. With `is_latent` one cache holds
    both: the values are the first `value_dim` channels of the keys (see `KVSpec.mla`). On one rank of a tensor-parallel
    group, `num_kv_heads` counts the heads of that rank, and `num_layers` the layers of that pipeline stage.

    bytes per token = layers * heads * (head_dim + value_dim) * bytes per element, as in Kwon et al., "Efficient memory
    management for large language model serving with PagedAttention", SOSP 2023, section 3; to which int8 adds a float32
    per token, head and tensor, and int4 two bfloat16 per group of channels. The scales of fp8 belong to the weights.

    >>> KVSpec(num_layers=32, num_kv_heads=8, head_dim=128).bytes_per_token  # Llama-3-8B in bfloat16
    131072
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    block_size: int = 16
    value_dim: int | None = None
    is_latent: bool = False

    def __post_init__(self) -> None:
        if self.value_dim is None:
            # Two specs of the same shape are equal, however they were written down.
            object.__setattr__(self, "value_dim", self.head_dim)
        try:
            keep_int(self, "num_layers", at_least=1, at_most=MAX_LAYERS)
            keep_int(self, "num_kv_heads", at_least=1, at_most=MAX_HEADS)
            keep_int(self, "head_dim", at_least=1, at_most=MAX_DIM)
            keep_int(self, "value_dim", at_least=1, at_most=MAX_DIM)
            keep_int(self, "block_size", at_least=1, at_most=MAX_BLOCK_SIZE)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        if not isinstance(self.dtype, str) or self.dtype not in BITS_PER_ELEMENT:
            hint = ": fp8 is float8_e4m3fn" if self.dtype == "fp8" else ""
            raise ConfigError(f"dtype must be one of {', '.join(BITS_PER_ELEMENT)}, found {shown(self.dtype)}{hint}")
        if not isinstance(self.is_latent, bool):
            raise ConfigError(f"is_latent must be True or False, found {self.is_latent!r}")
        head_dim, value_dim = self.dims
        if self.is_latent and value_dim > head_dim:
            raise ConfigError(f"a latent's values are a part of its keys: value_dim {value_dim} > head_dim {head_dim}")
        if self.dtype == "int4":
            self._check_int4(head_dim, value_dim)

    def _check_int4(self, head_dim: int, value_dim: int) -> None:
        for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
            if dim % 2:
                raise ConfigError(f"int4 holds channels in pairs: {name} must be even, found {dim}")
        if self.is_latent and value_dim % int4_group_size(head_dim):
            raise ConfigError(
                f"a latent's values must end with a group of int4 channels: value_dim {value_dim} is no multiple of "
                f"{int4_group_size(head_dim)}"
            )

    @classmethod
    def mla(
        cls,
        num_layers: int,
        *,
        latent_dim: int = 512,
        rope_dim: int = 64,
        dtype: str = "bfloat16",
        block_size: int = 64,
    ) -> KVSpec:
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the latent and the rotary key, once.

        >>> KVSpec.mla(61).bytes_per_token  # DeepSeek-V3 in bfloat16
        70272
        """
        return cls(
            num_layers,
            1,
            latent_dim + rope_dim,
            dtype=dtype,
            block_size=block_size,
            value_dim=latent_dim,
            is_latent=True,
        )

    @property
    def dims(self) -> tuple[int, int]:
        """Channels of a key and of a value."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers, its scales included."""
        return self.num_layers * self.num_kv_heads * sum(part.bytes_per_head for part in self.parts)

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes in all layers: `block_size` tokens, each part rounded up to `ALIGNMENT`."""
        return self.num_layers * self.bytes_per_layer

    @property
    def bytes_per_layer(self) -> int:
        """Bytes that one layer takes in a block."""
        last = self.parts[-1]
        return last.offset + self._size(last.bytes_per_head)

    @property
    def parts(self) -> tuple[KVPart, ...]:
        """A layer's tensors in the order in which they lie in a block."""
        dims = self.dims[:1] if self.is_latent else self.dims
        widths = {
            name: dim * BITS_PER_ELEMENT[self.dtype] // 8 for name, dim in zip(("key", "value"), dims, strict=False)
        }
        for name, dim in zip(("k_scale", "v_scale"), dims, strict=False):
            if self.dtype == "int8":
                widths[name] = 4
            elif self.dtype == "int4":
                widths[name] = dim // int4_group_size(dim) * 2 * 2
        parts, offset = [], 0
        for name, width in widths.items():
            parts.append(KVPart(name, offset, width))
            offset += self._size(width)
        return tuple(parts)

    def _size(self, bytes_per_head: int) -> int:
        return cdiv(self.block_size * self.num_kv_heads * bytes_per_head, ALIGNMENT) * ALIGNMENT

    def num_blocks_for(self, num_bytes: int) -> int:
        """How many blocks fit into `num_bytes`. Raises InvalidArgumentError, with the arithmetic, if not one does.

        >>> KVSpec(num_layers=32, num_kv_heads=8, head_dim=128).num_blocks_for(24 * 2**30)
        12288
        """
        num_blocks = as_int("num_bytes", num_bytes, at_least=0, at_most=2**62) // self.bytes_per_block
        if not num_blocks:
            raise InvalidArgumentError(
                f"{num_bytes} bytes hold no block: one takes {self.bytes_per_block} bytes ({self.block_size} tokens of "
                f"{self.bytes_per_token} bytes in {self.num_layers} layers)"
            )
        return num_blocks
