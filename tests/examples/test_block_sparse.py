"""Window, global and random blocks through compacted block tables."""

import pytest
import torch
from attention_examples import SIZES, assert_near, causal, dense, empty, int32, load, slots_of
from torch import Tensor

from pagedkv.attention import merge_states, paged_attention, write_kv

example = load("block_sparse")

CAUSAL = example.Pattern(window=2, num_global=1, num_random=1)
ENCODER = example.Pattern(window=3, num_global=1, num_random=2, causal=False)
TABLE = int32(5, 2, 7, 0, 3, 6, 1, 4)


def sequence(block_size: int, head_dim: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(num_tokens, heads, head_dim, generator=generator) for heads in (4, 2, 2))
    caches = empty(8, block_size, 2, head_dim)
    write_kv(key, value, *caches, slots_of(TABLE, block_size)[:num_tokens])
    return query, key, value, caches


def mask(num_tokens: int, block_size: int, pattern: object) -> Tensor:
    """(queries, keys) bool, token by token."""
    num_blocks = -(-num_tokens // block_size)
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for position in range(num_tokens):
        for block in pattern.blocks(position // block_size, num_blocks):
            visible[position, block * block_size : (block + 1) * block_size] = True
    return visible & causal(num_tokens, num_tokens) if pattern.causal else visible


@SIZES
@pytest.mark.parametrize("unfilled", [0, 1, 3])
@pytest.mark.parametrize("pattern", [CAUSAL, ENCODER], ids=["causal", "encoder"])
def test_a_prefill_equals_dense_attention_under_the_mask(
    block_size: int, head_dim: int, unfilled: int, pattern: object
) -> None:
    num_tokens = 8 * block_size - unfilled
    query, key, value, caches = sequence(block_size, head_dim, num_tokens)

    out = example.attend(query, caches, TABLE, num_tokens=num_tokens, pattern=pattern)

    assert_near(out, dense(query, key, value, mask(num_tokens, block_size, pattern)))


@SIZES
def test_decode_steps_through_a_block_equal_dense_attention_under_the_mask(block_size: int, head_dim: int) -> None:
    first, last = 6 * block_size - 1, 7 * block_size + 1
    query, key, value, caches = sequence(block_size, head_dim, last)
    expected = dense(query, key, value, mask(last, block_size, CAUSAL))

    for end in range(first, last + 1):
        out = example.attend(query[end - 1 : end], caches, TABLE, num_tokens=end, pattern=CAUSAL)

        assert_near(out, expected[end - 1 : end])


def test_a_chunk_that_begins_and_ends_within_blocks_equals_the_same_rows_of_a_prefill() -> None:
    query, _, _, caches = sequence(4, 8, 31)
    whole = example.attend(query, caches, TABLE, num_tokens=31, pattern=CAUSAL)

    chunk = example.attend(query[18:27], caches, TABLE, num_tokens=27, pattern=CAUSAL)

    assert_near(chunk, whole[18:27])


def test_a_partly_filled_last_block_stands_last_and_counts_only_its_tokens() -> None:
    tables, lengths, starts = example.sparse_rows(TABLE, 4, range(29, 30), 30, CAUSAL)

    assert CAUSAL.blocks(7, 8) == [0, 4, 6, 7]
    assert tables.tolist() == [[5, 3, 1, 4]]
    assert lengths.tolist() == [14]
    assert starts.tolist() == [0, 1]


def test_a_block_of_queries_sees_window_global_and_random_blocks() -> None:
    for query_block in range(40):
        seen = CAUSAL.blocks(query_block, 40)

        assert seen == sorted(set(seen))
        assert {0, query_block, max(query_block - 1, 0)} <= set(seen)
        assert len(seen) == min(query_block + 1, 4)
        assert max(seen) == query_block


def test_in_an_encoder_the_window_is_centred_and_global_blocks_see_everything() -> None:
    assert ENCODER.blocks(0, 6) == [0, 1, 2, 3, 4, 5]
    assert {0, 2, 3, 4} < set(ENCODER.blocks(3, 9))
    assert len(ENCODER.blocks(3, 9)) == 6


def test_blocks_that_are_not_chosen_are_never_read() -> None:
    query, _, _, caches = sequence(4, 8, 31)
    expected = example.attend(query[30:], caches, TABLE, num_tokens=31, pattern=CAUSAL)
    for block in set(range(8)) - set(CAUSAL.blocks(7, 8)):
        for cache in caches:
            cache[TABLE[block]] = torch.nan

    out = example.attend(query[30:], caches, TABLE, num_tokens=31, pattern=CAUSAL)

    assert out.tolist() == expected.tolist()


def test_parts_of_the_pattern_may_be_attended_apart_and_merged() -> None:
    query, _, _, caches = sequence(4, 8, 31)
    whole = example.attend(query[30:], caches, TABLE, num_tokens=31, pattern=CAUSAL)
    parts = [
        paged_attention(query[30:], *caches, TABLE[blocks][None], int32(length), int32(0, 1), return_lse=True)
        for blocks, length in (([4, 0], 8), ([6, 7], 7))
    ]

    out, _ = merge_states(*parts[0], *parts[1])

    assert_near(out, whole)
