"""A layer's views: whose bytes they are, and that attention reads and writes through them."""

from __future__ import annotations

import pytest
import torch
from storage_contents import (
    DTYPES,
    ids,
    raw_bytes,
    small_spec,
)

from pagedkv import InvalidArgumentError
from pagedkv.attention import paged_attention, write_kv
from pagedkv.storage import KVSpec, KVStorage


@pytest.mark.parametrize(("layout", "strides"), [("NHD", (2 * 128, 2 * 8, 8, 1)), ("HND", (2 * 128, 8, 4 * 8, 1))])
def test_a_layer_s_views_stand_whole_blocks_apart_in_the_order_that_was_asked_for(layout: str, strides: tuple) -> None:
    storage = KVStorage(KVSpec(2, 2, 8, dtype="float16", block_size=4), 3, layout=layout)

    for layer in range(2):
        for view in (storage.key_cache(layer), storage.value_cache(layer)):
            assert view.shape == (3, 4, 2, 8)
            assert view.dtype == torch.float16
            assert view.stride() == strides
        assert storage.k_scale(layer) is None
        assert storage.v_scale(layer) is None


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_views_share_a_byte_and_together_they_are_the_storage(dtype: str, layout: str, device: str) -> None:
    storage = KVStorage(KVSpec(3, 2, 16, dtype=dtype, block_size=4, value_dim=8), 2, device, layout=layout)

    marked = 0
    for layer in range(3):
        for view in (
            storage.key_cache(layer),
            storage.value_cache(layer),
            storage.k_scale(layer),
            storage.v_scale(layer),
        ):
            if view is not None:
                raw = raw_bytes(view)
                assert not raw.any()
                raw.fill_(1)
                marked += raw.numel()

    assert marked == 2 * storage.spec.bytes_per_block
    assert int(storage.read_blocks(ids(0, 1)).sum()) == marked


@pytest.mark.parametrize(("layout", "strides"), [("NHD", (3, 1)), ("HND", (1, 2))])
def test_int8_has_a_scale_per_token_and_head_in_the_order_of_the_layout(layout: str, strides: tuple[int, int]) -> None:
    storage = KVStorage(KVSpec(2, 3, 16, dtype="int8", block_size=2), 3, layout=layout)

    for scale in (storage.k_scale(0), storage.v_scale(1)):
        assert (scale.shape, scale.dtype) == ((3, 2, 3), torch.float32)
        assert scale.stride()[1:] == strides


@pytest.mark.parametrize(("layout", "strides"), [("NHD", (3 * 4, 4, 2, 1)), ("HND", (4, 2 * 4, 2, 1))])
def test_int4_packs_two_channels_and_has_a_scale_per_group_in_the_order_of_the_layout(
    layout: str, strides: tuple[int, ...]
) -> None:
    storage = KVStorage(KVSpec(1, 3, 64, dtype="int4", block_size=2), 3, layout=layout)

    assert (storage.key_cache(0).shape, storage.key_cache(0).dtype) == ((3, 2, 3, 32), torch.uint8)
    assert (storage.k_scale(0).shape, storage.k_scale(0).dtype) == ((3, 2, 3, 2, 2), torch.bfloat16)
    assert storage.k_scale(0).stride()[1:] == strides


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_latent_s_values_are_the_first_channels_of_its_keys(dtype: str) -> None:
    storage = KVStorage(KVSpec.mla(2, latent_dim=64, rope_dim=32, dtype=dtype, block_size=2), 3)
    key, value = storage.key_cache(1), storage.value_cache(1)

    assert value.shape == (3, 2, 1, 64 // (2 if dtype == "int4" else 1))
    assert value.data_ptr() == key.data_ptr()
    if dtype == "int8":
        assert storage.v_scale(1).data_ptr() == storage.k_scale(1).data_ptr()
    if dtype == "int4":
        assert storage.k_scale(1).shape == (3, 2, 1, 3, 2)
        assert storage.v_scale(1).shape == (3, 2, 1, 2, 2)


@pytest.mark.parametrize("layer", [-1, 2, 1.0, None])
def test_a_layer_that_is_not_there_is_refused(layer: object) -> None:
    storage = KVStorage(small_spec(), 1)

    for view in (storage.key_cache, storage.value_cache, storage.k_scale, storage.v_scale):
        with pytest.raises(InvalidArgumentError, match="layer must be"):
            view(layer)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_writes_and_reads_through_the_views_as_through_tensors_of_its_own(dtype: str, layout: str) -> None:
    num_heads, head_dim, block_size, num_tokens = 2, 32, 4, 7
    storage = KVStorage(KVSpec(2, num_heads, head_dim, dtype=dtype, block_size=block_size), 4, layout=layout)
    layer = 1
    own = [storage.key_cache(layer), storage.value_cache(layer), storage.k_scale(layer), storage.v_scale(layer)]
    plain = [None if view is None else torch.zeros_like(view, memory_format=torch.contiguous_format) for view in own]
    number_type = (
        storage.key_cache(0).dtype if dtype in ("float64", "float32", "float16", "bfloat16") else torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    key, value, query = (
        torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(number_type) for _ in "kvq"
    )
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    slots = torch.tensor([3 * block_size + i for i in range(4)] + [block_size + i for i in range(3)])
    answers = []
    for keys, values, k_scale, v_scale in (own, plain):
        write_kv(key, value, keys, values, slots, k_scale=k_scale, v_scale=v_scale, backend="reference")
        lengths, starts = (
            torch.tensor([num_tokens], dtype=torch.int32),
            torch.tensor([0, num_tokens], dtype=torch.int32),
        )
        answers.append(
            paged_attention(
                query, keys, values, table, lengths, starts, k_scale=k_scale, v_scale=v_scale, backend="reference"
            )
        )

    assert torch.equal(*answers)
    assert answers[0].abs().sum() > 0
    assert not storage.key_cache(0).view(torch.uint8).any()


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_attention_takes_a_latent_cache_s_views(dtype: str) -> None:
    storage = KVStorage(KVSpec.mla(1, latent_dim=64, rope_dim=32, dtype=dtype, block_size=2), 3)
    generator = torch.Generator().manual_seed(0)
    latent, query = torch.randn(3, 1, 96, generator=generator), torch.randn(3, 4, 96, generator=generator)
    key, value, k_scale, v_scale = (
        view(0) for view in (storage.key_cache, storage.value_cache, storage.k_scale, storage.v_scale)
    )

    write_kv(latent, None, key, None, torch.tensor([4, 5, 0]), k_scale=k_scale, backend="reference")
    answer = paged_attention(
        query,
        key,
        value,
        torch.tensor([[2, 0]], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        k_scale=k_scale,
        v_scale=v_scale,
        backend="reference",
    )

    # The first query sees one key: its answer is that key's latent.
    assert (answer[0] - latent[0, :, :64]).abs().max() < {"float32": 1e-6, "int8": 0.05, "int4": 0.3}[dtype]
