"""Pools of more than 2^31 elements and more than 2^32 bytes: offsets that do not fit in 32 bits.

The pools are address space, of which a few blocks are ever touched: the memory behind the rest is never asked for.
"""

from __future__ import annotations

import resource

import pytest
import torch
from torch import Tensor

from pagedkv.attention import BackendUnsupportedError, backend_info, paged_attention, scale_shape, write_kv
from pagedkv.attention.backends import backend_named
from pagedkv.attention.formats import format_of

READERS = [info.name for info in backend_info() if info.is_available and backend_named(info.name).runs_on("cpu")]

NUM_KV_HEADS, DIM, BLOCK_SIZE = 2, 64, 16
BLOCK_ELEMENTS = BLOCK_SIZE * NUM_KV_HEADS * DIM
FORMATS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "fp8_e4m3": (torch.bfloat16, torch.float8_e4m3fn),
    "int8": (torch.bfloat16, torch.int8),
    "int4": (torch.bfloat16, torch.uint8),
}
MAX_RESIDENT_BYTES = 200 << 20


def empty_pool(cache_dtype: torch.dtype, *, has_few_blocks: bool) -> Tensor:
    """A cache of which the last block begins beyond 2^31 elements and beyond 2^32 bytes.

    Of many blocks that lie close together, or of three that lie far apart.
    """
    dim = DIM // 2 if cache_dtype == torch.uint8 else DIM
    block_elements = BLOCK_SIZE * NUM_KV_HEADS * dim
    reach = max(2**31, 2**32 // cache_dtype.itemsize) + block_elements
    if not has_few_blocks:
        return torch.empty(-(-reach // block_elements) + 1, BLOCK_SIZE, NUM_KV_HEADS, dim, dtype=cache_dtype)
    block_stride = -(-reach // 2)
    strides = (block_stride, NUM_KV_HEADS * dim, dim, 1)
    storage = torch.empty(2 * block_stride + block_elements, dtype=cache_dtype)
    return storage.as_strided((3, BLOCK_SIZE, NUM_KV_HEADS, dim), strides)


def empty_scales(cache: Tensor) -> Tensor | None:
    cache_format = format_of(cache.dtype)
    assert cache_format is not None
    shape = scale_shape(cache_format, cache.shape[0], BLOCK_SIZE, NUM_KV_HEADS, DIM)
    if shape is None or len(shape) == 1:
        return None
    return torch.empty(shape, dtype=torch.bfloat16 if cache.dtype == torch.uint8 else torch.float32)


def resident_bytes() -> int:
    """The most memory that this process has held at one time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("has_few_blocks", [False, True], ids=["many blocks", "blocks far apart"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", READERS)
def test_blocks_beyond_32_bits_are_written_and_read(backend: str, name: str, has_few_blocks: bool) -> None:
    dtype, cache_dtype = FORMATS[name]
    held = resident_bytes()
    keys, values = (empty_pool(cache_dtype, has_few_blocks=has_few_blocks) for _ in range(2))
    k_scale, v_scale = empty_scales(keys), empty_scales(values)
    last = keys.shape[0] - 1
    generator = torch.Generator().manual_seed(0)
    new_keys, new_values = torch.randn(2, 20, NUM_KV_HEADS, DIM, generator=generator).to(dtype)
    query = torch.randn(3, 4, DIM, generator=generator).to(dtype)
    # 20 tokens: a block before the end of the pool, and four slots of the last one.
    slots = torch.cat((torch.arange(16) + (last - 1) * BLOCK_SIZE, torch.arange(4) + last * BLOCK_SIZE))
    block_table = torch.tensor([[last - 1, last]], dtype=torch.int32)
    seq_lens, starts = torch.tensor([20], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)

    written = {"k_scale": k_scale, "v_scale": v_scale}
    try:
        write_kv(new_keys, new_values, keys, values, slots, **written, backend=backend)
        out = paged_attention(query, keys, values, block_table, seq_lens, starts, **written, backend=backend)
    except BackendUnsupportedError as refusal:
        pytest.skip(str(refusal))
    # A backend that cuts offsets short in the same way twice would find what it wrote; torch's own indexing would not.
    found = paged_attention(query, keys, values, block_table, seq_lens, starts, **written, backend="reference")

    # The same in a pool of two blocks, by the reference.
    small = [torch.zeros((2, *cache.shape[1:]), dtype=cache_dtype) for cache in (keys, values)]
    small_scales = [None if s is None else torch.zeros((2, *s.shape[1:]), dtype=s.dtype) for s in (k_scale, v_scale)]
    scales = dict(zip(("k_scale", "v_scale"), small_scales, strict=True))
    write_kv(new_keys, new_values, *small, torch.arange(20), **scales, backend="reference")
    small_table = torch.tensor([[0, 1]], dtype=torch.int32)
    wanted = paged_attention(query, *small, small_table, seq_lens, starts, **scales, backend="reference")
    # Weighted means of 20 values of about 1; weights and result are rounded to the dtype. A foreign block is off by 1.
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert resident_bytes() - held < MAX_RESIDENT_BYTES, "the pool was copied, or touched where nothing is"


@pytest.mark.parametrize("backend", READERS)
def test_slots_beyond_32_bits_touch_no_other_block(backend: str) -> None:
    pool = empty_pool(torch.int8, has_few_blocks=False)
    scale = empty_scales(pool)
    last = pool.shape[0] - 1
    # Where an offset in elements, cut to 32 bits, would lead.
    aliased = (last * BLOCK_ELEMENTS) % 2**32 // BLOCK_ELEMENTS
    pool[aliased] = 7

    try:
        key = torch.ones(1, NUM_KV_HEADS, DIM, dtype=torch.bfloat16)
        slot = torch.tensor([last * BLOCK_SIZE])
        write_kv(key, None, pool, None, slot, k_scale=scale, backend=backend)
    except BackendUnsupportedError as refusal:
        pytest.skip(str(refusal))

    assert (pool[last, 0] == 127).all()
    assert (pool[aliased] == 7).all()
