"""Attention sinks and a sliding window in a constant number of blocks."""

import pytest
import torch
from attention_examples import SIZES, assert_near, dense, empty, int32, load
from torch import Tensor

from pagedkv.attention import paged_attention, write_kv
from pagedkv.block_pool import BlockPool

example = load("streaming_sinks")


def kept_positions(position: int, block_size: int, num_sinks: int, num_recent: int) -> list[int]:
    """Positions in the text of what token `position` sees, itself included."""
    last_block = position // block_size
    blocks = {*range(min(num_sinks, last_block + 1)), *range(max(last_block - num_recent + 1, 0), last_block + 1)}
    return [i for i in range(position + 1) if i // block_size in blocks]


def stream(head_dim: int, num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(num_tokens, heads, head_dim, generator=generator) for heads in (4, 2, 2)]


def turned(x: Tensor, positions: range) -> Tensor:
    return torch.cat([example.rotate(x[i : i + 1].double(), position) for i, position in enumerate(positions)])


@SIZES
@pytest.mark.parametrize(("num_sinks", "num_recent"), [(1, 2), (2, 1)])
def test_with_rope_a_stream_equals_dense_attention_to_the_kept_tokens_at_their_places_in_the_cache(
    block_size: int, head_dim: int, num_sinks: int, num_recent: int
) -> None:
    query, key, value = stream(head_dim, 6 * block_size + 2)
    caches = empty(3, block_size, 2, head_dim)
    kept = example.SinkWindow(BlockPool(3), block_size, num_sinks=num_sinks, num_recent=num_recent)

    for i in range(len(query)):
        out = example.step_rope(query[i : i + 1], key[i : i + 1], value[i : i + 1], caches, kept)

        seen = kept_positions(i, block_size, num_sinks, num_recent)
        now = turned(query[i : i + 1], range(len(seen) - 1, len(seen)))
        visible = torch.ones(1, len(seen), dtype=torch.bool)
        assert_near(out, dense(now, turned(key[seen], range(len(seen))), value[seen], visible))


@SIZES
def test_with_alibi_a_stream_equals_dense_attention_with_distances_within_the_cache(
    block_size: int, head_dim: int
) -> None:
    query, key, value = stream(head_dim, 5 * block_size + 1)
    caches = empty(3, block_size, 2, head_dim)
    kept = example.SinkWindow(BlockPool(3), block_size, num_sinks=1, num_recent=2)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    for i in range(len(query)):
        out = example.step_alibi(query[i : i + 1], key[i : i + 1], value[i : i + 1], caches, kept, slopes)

        seen = kept_positions(i, block_size, 1, 2)
        distances = torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
        visible = torch.ones(1, len(seen), dtype=torch.bool)
        bias = -slopes.double()[:, None, None] * distances
        assert_near(out, dense(query[i : i + 1], key[seen], value[seen], visible, bias=bias))


def test_a_prompt_that_fits_the_kept_blocks_is_an_ordinary_causal_call() -> None:
    query, key, value = stream(8, 14)
    caches, alike = empty(3, 4, 2, 8), empty(3, 4, 2, 8)
    kept, stepped = (example.SinkWindow(BlockPool(3), 4, num_sinks=1, num_recent=2) for _ in range(2))
    expected = [
        example.step_rope(query[i : i + 1], key[i : i + 1], value[i : i + 1], alike, stepped) for i in range(14)
    ]

    slots = torch.tensor([kept.append() for _ in range(10)])
    write_kv(turned(key[:10], range(10)).float(), value[:10], *caches, slots)
    prompt = turned(query[:10], range(10)).float()
    out = paged_attention(prompt, *caches, int32(*kept.blocks)[None], int32(10), int32(0, 10))
    rest = [example.step_rope(query[i : i + 1], key[i : i + 1], value[i : i + 1], caches, kept) for i in range(10, 14)]

    assert_near(torch.cat((out, *rest)), torch.cat(expected))


def test_what_slides_out_goes_back_to_the_pool_and_sinks_stay() -> None:
    pool = BlockPool(8)
    kept = example.SinkWindow(pool, 4, num_sinks=1, num_recent=2)
    first_block = kept.append() // 4
    used = []

    for _ in range(99):
        kept.append()
        used.append(pool.num_used)

    assert max(used) == 3
    assert kept.blocks[0] == first_block
    assert (kept.num_kept, kept.num_dropped) == (12, 88)
    pool.check_invariants()


def test_slots_of_kept_tokens_are_distinct_and_lie_in_the_kept_blocks() -> None:
    kept = example.SinkWindow(BlockPool(4), 4, num_sinks=2, num_recent=2)

    slots = [kept.append() for _ in range(100)]

    live = [slots[i] for i in kept_positions(99, 4, 2, 2)]
    assert len(set(live)) == kept.num_kept == 16
    assert {slot // 4 for slot in live} == set(kept.blocks)


def test_scores_with_rope_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    near, far = (
        (example.rotate(query, start + 3) * example.rotate(key, start)).sum().item() for start in (0, 1_000_000)
    )

    assert near == pytest.approx(far, abs=1e-8)
    assert near != pytest.approx((query * key).sum().item(), abs=1e-3)
