"""What must hold of shapes, dtypes and devices before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import Features
from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.formats import CacheFormat, format_of

__all__ = ["attention_features", "check_tree_mask", "check_write", "checked_window"]

MAX_BLOCK_SIZE = 256
MAX_HEAD_DIM = 1024
# A side of a window that reaches this far is as good as open, and would overflow a position in int32.
WIDEST_WINDOW = 2**30


def checked_window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The window as two numbers, -1 where it is open."""
    if window is None:
        return -1, -1
    if not isinstance(window, tuple) or len(window) != 2:
        raise AttentionArgumentError(f"window must be (left, right) or None, found {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise AttentionArgumentError(f"a side of window must be a whole number of keys or None, found {side!r}")
    left, right = (-1 if side is None or side >= WIDEST_WINDOW else side for side in window)
    return left, right


def check_tree_mask(tree_mask: Tensor, max_query_len: int) -> None:
    """Raise AttentionArgumentError unless a row has a bit for every query token of the longest sequence. O(1)."""
    if tree_mask.shape[1] * 32 < max_query_len:
        raise AttentionArgumentError(
            f"tree_mask has {tree_mask.shape[1]} words of 32 bits, but a sequence has {max_query_len} query tokens"
        )


def attention_features(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    tree_mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor | None,
) -> Features:
    """Check what can be seen without reading a value, and say what the call asks of a backend. O(1)."""
    # A layer pays for these lines at every step, so each attribute of a tensor is read once and messages are put
    # together only where something is wrong.
    if not isinstance(query, Tensor):
        raise _no_tensor("query", query)
    device, dtype, shape = query.device, query.dtype, query.shape
    if len(shape) != 3:
        raise _misfit("query must be (tokens, q_heads, head_dim)", query)
    if format_of(dtype) is not CacheFormat.FLOAT:
        raise _misfit("query must be of floats", query)
    num_tokens, num_q_heads, head_dim = shape
    cache_format, cache_shape = _check_cache("key_cache", key_cache, device)
    _, value_shape = _check_cache("value_cache", value_cache, device)
    _, block_size, num_kv_heads, stored_dim = cache_shape
    if cache_format is CacheFormat.FLOAT and key_cache.dtype != dtype:
        raise AttentionArgumentError(f"key_cache is {key_cache.dtype}, query is {dtype}: they must agree")
    if value_cache.dtype != key_cache.dtype or value_shape[:3] != cache_shape[:3]:
        raise AttentionArgumentError(
            "value_cache must agree with key_cache in dtype, blocks, block_size and kv_heads: "
            f"{_looks(value_cache)} against {_looks(key_cache)}"
        )
    packing = 2 if cache_format is CacheFormat.INT4 else 1
    if stored_dim * packing != head_dim:
        raise AttentionArgumentError(f"key_cache holds heads of {stored_dim * packing}, query has {head_dim}")
    if num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise AttentionArgumentError(f"q_heads ({num_q_heads}) must be a multiple of kv_heads ({num_kv_heads})")
    value_dim = value_shape[3] * packing
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        _check_dim(name, dim)
    num_tables, _ = _check_indices("block_tables", block_tables, 2, device)
    (num_seqs,) = _check_indices("seq_lens", seq_lens, 1, device)
    (num_starts,) = _check_indices("query_start_loc", query_start_loc, 1, device)
    if num_tables != num_seqs or num_starts != num_seqs + 1:
        raise AttentionArgumentError(
            f"{num_seqs} seq_lens need as many rows of block_tables and one more query_start_loc, "
            f"found {num_tables} and {num_starts}"
        )
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            if per_head.shape != (num_q_heads,):
                raise _misfit(f"{name} must be ({num_q_heads},)", per_head)
            if per_head.dtype != torch.float32:
                raise _misfit(f"{name} must be float32", per_head)
            _check_device(name, per_head, device)
    if tree_mask is not None:
        if tree_mask.ndim != 2 or tree_mask.shape[0] != num_tokens:
            raise _misfit("tree_mask must be (tokens, words)", tree_mask)
        if tree_mask.dtype != torch.int32:
            raise _misfit("tree_mask must be int32", tree_mask)
        _check_device("tree_mask", tree_mask, device)
    _check_scale("k_scale", k_scale, cache_format, cache_shape, head_dim, device)
    _check_scale("v_scale", v_scale, cache_format, cache_shape, value_dim, device)
    if out is not None:
        wanted = (num_tokens, num_q_heads, value_dim)
        if out.shape != wanted or out.dtype != dtype:
            raise _misfit(f"out must be {wanted} {dtype}", out)
        strides = out.stride()
        if 0 in strides and any(size > 1 and stride == 0 for size, stride in zip(wanted, strides, strict=True)):
            raise AttentionArgumentError(f"out must not be expanded: several results have one place, strides {strides}")
        _check_device("out", out, device)
    return Features(
        device=device,
        dtype=dtype,
        cache_format=cache_format,
        block_size=block_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        has_alibi=alibi_slopes is not None,
        has_tree_mask=tree_mask is not None,
    )


def check_write(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Features:
    """Check a write, but for the values of `slot_mapping`. O(1)."""
    if (value is None) != (value_cache is None):
        raise AttentionArgumentError("value and value_cache are given both or, for a latent cache, neither")
    if not isinstance(key, Tensor):
        raise _no_tensor("key", key)
    device, dtype, shape = key.device, key.dtype, key.shape
    cache_format, cache_shape = _check_cache("key_cache", key_cache, device)
    _check_new("key", key, key_cache, cache_format, k_scale, key)
    _check_dim("head_dim", shape[2])
    value_dim = 0
    if value is not None and value_cache is not None:
        value_format, value_shape = _check_cache("value_cache", value_cache, device)
        _check_new("value", value, value_cache, value_format, v_scale, key)
        value_dim = value.shape[2]
        _check_dim("value_dim", value_dim)
        if value_cache.dtype != key_cache.dtype or value_shape[:3] != cache_shape[:3]:
            raise AttentionArgumentError(
                f"value_cache {_looks(value_cache)} does not match key_cache {_looks(key_cache)}"
            )
    if not isinstance(slot_mapping, Tensor):
        raise _no_tensor("slot_mapping", slot_mapping)
    if slot_mapping.shape != shape[:1]:
        raise _misfit(f"slot_mapping must be ({shape[0]},)", slot_mapping)
    if slot_mapping.dtype != torch.int64:
        raise _misfit("slot_mapping must be int64", slot_mapping)
    _check_device("slot_mapping", slot_mapping, device)
    return Features(
        device=device,
        dtype=dtype,
        cache_format=cache_format,
        block_size=cache_shape[1],
        num_q_heads=shape[1],
        num_kv_heads=shape[1],
        head_dim=shape[2],
        value_dim=value_dim,
    )


def _check_new(
    name: str, new: Tensor, cache: Tensor, cache_format: CacheFormat, scale: Tensor | None, key: Tensor
) -> None:
    """Check keys or values that are to be written to a cache which has been checked."""
    if not isinstance(new, Tensor):
        raise _no_tensor(name, new)
    dtype, shape, cache_shape = new.dtype, new.shape, cache.shape
    if len(shape) != 3:
        raise _misfit(f"{name} must be (tokens, kv_heads, head_dim)", new)
    if format_of(dtype) is not CacheFormat.FLOAT:
        raise _misfit(f"{name} must be of floats", new)
    if dtype != key.dtype:
        raise _misfit(f"{name} must be {key.dtype}, as key is", new)
    _check_device(name, new, key.device)
    num_tokens, num_heads, dim = shape
    packing = 2 if cache_format is CacheFormat.INT4 else 1
    if num_tokens != key.shape[0] or num_heads != cache_shape[2] or dim != cache_shape[3] * packing:
        raise AttentionArgumentError(
            f"{name} {tuple(shape)} does not fit {key.shape[0]} tokens and {name}_cache {tuple(cache_shape)}"
        )
    if cache_format is CacheFormat.FLOAT and dtype != cache.dtype:
        raise AttentionArgumentError(f"{name} is {dtype}, {name}_cache is {cache.dtype}: they must agree")
    _check_scale(f"{name[0]}_scale", scale, cache_format, cache_shape, dim, key.device)


def _looks(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _no_tensor(name: str, value: object) -> AttentionArgumentError:
    kind = type(value)
    return AttentionArgumentError(f"{name} must be a torch tensor, found {kind.__module__}.{kind.__qualname__}")


def _misfit(rule: str, tensor: Tensor) -> AttentionArgumentError:
    if not isinstance(tensor, Tensor):  # An array of numpy's would be told of as what it should have been.
        return _no_tensor(rule.partition(" ")[0], tensor)
    return AttentionArgumentError(f"{rule}, found {_looks(tensor)}")


def _check_dim(name: str, dim: int) -> None:
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise AttentionArgumentError(f"{name} must be in 1..{MAX_HEAD_DIM}, found {dim}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise AttentionArgumentError(f"{name} is on {tensor.device}, expected {device}")


def _check_indices(name: str, tensor: Tensor, ndim: int, device: torch.device) -> torch.Size:
    """The shape."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    shape = tensor.shape
    if len(shape) != ndim or tensor.dtype != torch.int32:
        raise _misfit(f"{name} must be {ndim}-D int32", tensor)
    _check_device(name, tensor, device)
    return shape


def _check_cache(name: str, cache: Tensor, device: torch.device) -> tuple[CacheFormat, torch.Size]:
    """The format and the shape."""
    if not isinstance(cache, Tensor):
        raise _no_tensor(name, cache)
    shape = cache.shape
    if len(shape) != 4:
        raise _misfit(f"{name} must be (blocks, block_size, kv_heads, head_dim)", cache)
    _check_device(name, cache, device)
    cache_format = format_of(cache.dtype)
    if cache_format is None:
        raise AttentionArgumentError(f"{name} is {cache.dtype}, which is no cache format")
    if not 1 <= shape[1] <= MAX_BLOCK_SIZE:
        raise AttentionArgumentError(f"{name} has blocks of {shape[1]}, supported are 1..{MAX_BLOCK_SIZE}")
    if shape[2] < 1:
        raise _misfit(f"{name} must have a head", cache)
    if cache.stride(3) != 1 and shape[3] != 1:
        raise AttentionArgumentError(f"{name} must be contiguous within a head, found strides {cache.stride()}")
    return cache_format, shape


def _check_scale(
    name: str,
    scale: Tensor | None,
    cache_format: CacheFormat,
    cache_shape: torch.Size,
    head_dim: int,
    device: torch.device,
) -> None:
    if cache_format is CacheFormat.FLOAT:
        if scale is not None:
            raise AttentionArgumentError(f"{name} is given, but a cache of plain floats has no scales")
        return
    is_fp8 = cache_format in (CacheFormat.FP8_E4M3, CacheFormat.FP8_E5M2)
    if scale is None:
        if is_fp8:
            return
        raise AttentionArgumentError(f"an {cache_format.value} cache needs {name}")
    _check_device(name, scale, device)
    per_token = tuple(cache_shape[:3])
    if cache_format is CacheFormat.INT4:
        groups = scale.shape[3] if scale.ndim == 5 else 0
        fits = scale.ndim == 5 and scale.shape[:3] == per_token and scale.shape[4] == 2
        if not fits or groups < 1 or head_dim % groups or (head_dim // groups) % 2:
            raise AttentionArgumentError(
                f"{name} of an int4 cache must be {(*per_token, 'groups', 2)} with groups of an even number of the "
                f"{head_dim} channels, found {tuple(scale.shape)}"
            )
        if scale.dtype != torch.bfloat16:
            raise _misfit(f"{name} of an int4 cache must be bfloat16", scale)
        # Kernels walk a head's groups in memory.
        if scale.stride(4) != 1 or (groups > 1 and scale.stride(3) != 2):
            raise AttentionArgumentError(f"{name} must be contiguous within a head, found strides {scale.stride()}")
        return
    if scale.dtype != torch.float32:
        raise _misfit(f"{name} must be float32", scale)
    allowed = ((), (cache_shape[2],)) if is_fp8 else (per_token,)
    if tuple(scale.shape) not in allowed:
        wanted = " or ".join(str(shape) for shape in allowed)
        raise AttentionArgumentError(
            f"{name} of an {cache_format.value} cache must be {wanted}, found {tuple(scale.shape)}"
        )
