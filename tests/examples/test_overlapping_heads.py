"""Heads that overlap, as a view of plain heads in the cache."""

import pytest
import torch
from attention_examples import assert_near, causal, dense, int32, load, slots_of
from torch import Tensor

example = load("overlapping_heads")

# block_size, head_dim, overlap; 48 + 2 * 8 is a head that fast backends take.
SIZES = pytest.mark.parametrize(("block_size", "head_dim", "overlap"), [(4, 6, 1), (4, 6, 6), (16, 48, 8), (4, 8, 0)])
HEADS, NUM_TOKENS, TABLE = 4, 11, int32(3, 0, 2)


def concatenated(x: Tensor, overlap: int) -> Tensor:
    """Each head with the end of the one before and the start of the one after, zeros where there is none."""
    zeros = torch.zeros(len(x), overlap)
    heads = []
    for i in range(x.shape[1]):
        before = x[:, i - 1, x.shape[2] - overlap :] if i > 0 else zeros
        after = x[:, i + 1, :overlap] if i + 1 < x.shape[1] else zeros
        heads.append(torch.cat((before, x[:, i], after), dim=1))
    return torch.stack(heads, dim=1)


def written(block_size: int, head_dim: int, overlap: int) -> tuple[list[Tensor], tuple[object, object]]:
    generator = torch.Generator().manual_seed(11)
    made = [torch.randn(NUM_TOKENS, HEADS, head_dim, generator=generator) for _ in range(3)]
    caches = tuple(example.OverlappingCache(4, block_size, HEADS, head_dim, overlap=overlap) for _ in range(2))
    for cache in caches:
        cache.plain.fill_(torch.nan)
    return made, caches


@SIZES
def test_prefill_and_decode_equal_attention_to_concatenated_heads(block_size: int, head_dim: int, overlap: int) -> None:
    (query, key, value), caches = written(block_size, head_dim, overlap)
    slots = slots_of(TABLE, block_size)
    wide = [concatenated(x, overlap) for x in (query, key, value)]
    expected = dense(*wide, causal(NUM_TOKENS, NUM_TOKENS))

    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
        example.write(key[start:end], value[start:end], caches, slots[start:end])
        out = example.attend(query[start:end], caches, TABLE[None], int32(end), int32(0, end - start))

        assert out.shape == (end - start, HEADS, head_dim + 2 * overlap)
        assert_near(out, expected[start:end])


@SIZES
def test_without_a_causal_mask_it_is_the_papers_attention(block_size: int, head_dim: int, overlap: int) -> None:
    (query, key, value), caches = written(block_size, head_dim, overlap)
    example.write(key, value, caches, slots_of(TABLE, block_size)[:NUM_TOKENS])
    wide = [concatenated(x, overlap) for x in (query, key, value)]

    out = example.attend(query, caches, TABLE[None], int32(NUM_TOKENS), int32(0, NUM_TOKENS), causal=False)

    assert_near(out, dense(*wide, torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)))


def test_overlaps_are_stored_once() -> None:
    cache = example.OverlappingCache(2, 4, 8, 16, overlap=4)

    assert cache.rows.numel() == 2 * 4 * (8 * 16 + 8)
    assert cache.overlapping.shape == (2, 4, 8, 24)
    assert cache.overlapping.untyped_storage().data_ptr() == cache.plain.untyped_storage().data_ptr()


def test_writing_leaves_the_zeros_at_both_ends() -> None:
    (_, key, value), caches = written(4, 6, 2)

    example.write(key, value, caches, slots_of(TABLE, 4)[:NUM_TOKENS])

    for cache in caches:
        assert cache.overlapping[..., 0, :2].count_nonzero() == 0
        assert cache.overlapping[..., -1, -2:].count_nonzero() == 0


def test_an_overlap_beyond_the_neighbour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlap must be at most head_dim \(6\), found 7"):
        example.OverlappingCache(2, 4, 4, 6, overlap=7)
