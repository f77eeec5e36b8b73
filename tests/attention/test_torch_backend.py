"""The torch backend's own ways: pieces, batches of pieces, tiles, and rows of every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_steps import check_close, naive_attention, small_step

from pagedkv.attention import backend_info, pack_tree_mask, paged_attention
from pagedkv.attention.torch_calls import backend, decodes, key_pieces, prefills, setup
from pagedkv.attention.torch_calls.decodes import batches
from pagedkv.attention.torch_calls.key_pieces import KeyPieces

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": (3, 0)},
    {"window": (0, None)},
    {"window": (4, 2), "causal": False},
    {"softcap": 0.5},
    {"softcap": 0.5, "window": (5, 0)},
    {"sinks": torch.tensor([0.0, 1.5, -torch.inf, -2.0])},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 0.0])},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 0.0]), "causal": False, "softcap": 2.0},
]
RAGGED = ((1, 13), (3, 7), (1, 8), (0, 5), (2, 2), (6, 3), (1, 0), (9, 21), (1, 16))


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 keys, chunks of 16, and no more than 4 folded rows: every loop turns more than once."""
    monkeypatch.setattr(decodes, "PIECE_TOKENS", 8)
    monkeypatch.setattr(setup, "CHUNK_TOKENS", (16, 16))
    monkeypatch.setattr(backend, "MAX_FOLDED_ROWS", 4)
    monkeypatch.setattr(prefills, "QUERY_TILE", 4)


def attend(step: Any, **options: Any) -> Any:
    return paged_attention(*step.tensors, return_lse=True, backend="torch", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_a_ragged_batch_in_tiny_pieces(options: dict[str, Any], tiny_pieces: None) -> None:
    step = small_step(*RAGGED)

    check_close(attend(step, **options), naive_attention(step, **options), atol=1e-7 if "softcap" in options else 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_a_ragged_batch_in_pieces_of_the_usual_size(options: dict[str, Any]) -> None:
    step = small_step(*RAGGED, dtype=torch.float32)

    check_close(attend(step, **options), naive_attention(step, **options), atol=1e-5)


@pytest.mark.parametrize("num_queries", [3, 40], ids=["folded", "prefill"])
def test_a_tree_over_several_words(num_queries: int, tiny_pieces: None) -> None:
    step = small_step((1, 5), (num_queries, num_queries + 9))
    sees = torch.rand(num_queries + 1, num_queries, generator=torch.Generator().manual_seed(0)) < 0.5
    sees[1:] &= torch.ones(num_queries, num_queries).tril().bool()
    # The last query token is seen by none, not even itself.
    sees[:, -1] = False

    check_close(attend(step, tree_mask=pack_tree_mask(sees)), naive_attention(step, sees=sees))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_branch_that_nobody_sees_may_be_unwritten(softcap: float | None) -> None:
    step = small_step((3, 6))
    sees = torch.tensor([[True, False, False], [True, False, False], [True, False, True]])
    expected = naive_attention(step, sees=sees, softcap=softcap)
    for cache in (step.key_cache, step.value_cache):
        # Query token 1 stands at position 4, the first slot of the second block.
        cache[step.block_tables[0, 1], 0] = torch.nan

    check_close(attend(step, tree_mask=pack_tree_mask(sees), softcap=softcap), expected, atol=1e-7)


def test_a_query_that_sees_nothing_of_a_chunk_takes_nothing_from_it(tiny_pieces: None) -> None:
    # Query 0 stands at position 19: the first chunk of its tile holds keys that only it sees.
    step = small_step((9, 28))

    check_close(attend(step, window=(2, 0)), naive_attention(step, window=(2, 0)))


@pytest.mark.parametrize("layout", ["nhd", "hnd", "padded", "joint", "side_by_side", "latent"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole blocks", "tokens"])
def test_pieces_are_read_from_every_layout(layout: str, is_whole: bool) -> None:
    blocks, block_size, heads, dim = 5, 4, 3, 6
    storage = {
        "nhd": torch.randn(blocks, block_size, heads, dim),
        "hnd": torch.randn(blocks, heads, block_size, dim).transpose(1, 2),
        "padded": torch.randn(blocks + 1, block_size + 1, heads + 1, dim + 1)[1:, 1:, 1:, 1:],
        "joint": torch.randn(blocks, 2, block_size, heads, dim)[:, 1],
        "side_by_side": torch.randn(blocks, block_size, heads, 2 * dim)[..., dim:],
        "latent": torch.randn(blocks, block_size, 1, dim + 3)[..., :dim],
    }
    cache = storage[layout]
    table = torch.tensor([[4, 0, 2]], dtype=torch.int32)
    size = 8 if is_whole else 7

    pieces = KeyPieces.of(table, block_size, np.array([0]), np.array([4]), np.array([size]))
    found = pieces.read(cache, None, torch.float32, torch.empty(10000, dtype=torch.uint8))

    assert (pieces.offsets is None) == is_whole
    expected = torch.cat((cache[0], cache[2]))[:size].transpose(0, 1)[None]
    assert torch.equal(found, expected)


def test_sequences_without_keys_get_zeros() -> None:
    step = small_step((1, 0), (2, 0))

    out, lse = attend(step)

    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("block_size", [1, 3, 256])
def test_blocks_of_any_size(block_size: int, tiny_pieces: None) -> None:
    step = small_step((1, 13), (3, 7), (9, 21), block_size=block_size)

    check_close(attend(step), naive_attention(step))


def test_long_tokens_are_read_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    step = small_step((1, 9), (4, 8))
    expected = attend(step)
    monkeypatch.setattr(key_pieces, "MAX_TOKEN_BYTES", 8)

    check_close(attend(step), expected)


def test_a_shorter_piece_repeats_its_last_key() -> None:
    table = torch.tensor([[1, 0], [2, -9]], dtype=torch.int32)

    pieces = KeyPieces.of(table, 4, np.array([0, 1]), np.array([3, 0]), np.array([3, 2]))

    assert pieces.positions.tolist() == [[3, 4, 5], [0, 1, 1]]
    assert pieces.blocks.tolist() == [[1, 0, 0], [2, 2, 2]]
    assert pieces.offsets is not None
    assert pieces.offsets.tolist() == [[3, 0, 1], [0, 1, 1]]


def test_pieces_of_like_length_share_a_batch() -> None:
    sizes = np.array([10, 1000, 990, 1000, 400, 20])

    assert [batch.tolist() for batch in batches(sizes, 3072, 1024)] == [[1, 3, 2], [4], [5, 0]]
    assert [batch.tolist() for batch in batches(sizes, 2048, 1024)] == [[1, 3], [2], [4], [5, 0]]


def test_whole_pieces_share_a_batch_with_no_other() -> None:
    sizes = np.array([1000, 1024, 990, 1024])

    assert [batch.tolist() for batch in batches(sizes, 8192, 1024)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("head_dim", [1, 10, 80])
def test_heads_need_no_round_width(head_dim: int) -> None:
    step = small_step((1, 9), (3, 6), head_dim=head_dim, value_dim=head_dim)

    check_close(attend(step), naive_attention(step))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(12, 8), (8, 12)])
def test_keys_and_values_may_differ_in_width(head_dim: int, value_dim: int) -> None:
    step = small_step((1, 9), (3, 6), (20, 30), head_dim=head_dim, value_dim=value_dim)

    check_close(attend(step), naive_attention(step))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_latent_of_mla_is_read_as_keys_and_as_values(softcap: float | None) -> None:
    step = small_step((1, 9), (3, 6), num_kv_heads=1, group=4, head_dim=12, value_dim=8, layout="latent")

    check_close(attend(step, softcap=softcap), naive_attention(step, softcap=softcap), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4])
def test_low_precision_is_as_exact_as_its_rounding(dtype: torch.dtype, group: int) -> None:
    step = small_step((1, 9), (3, 6), (20, 20), group=group, dtype=dtype)

    out, lse = attend(step)

    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected = naive_attention(step)
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-2)


def test_the_sum_of_large_halves_is_finite() -> None:
    step = small_step((1, 600), dtype=torch.float16)
    step.key_cache.zero_()
    step.value_cache.fill_(60000.0)

    assert (attend(step)[0] == 60000).all()


def test_an_output_with_gaps_is_written_through_its_strides() -> None:
    step = small_step((1, 9), (20, 20))
    room = torch.full((21, 4, 16), 7.0, dtype=torch.float64)

    attend(step, out=room[..., ::2])

    torch.testing.assert_close(room[..., ::2], naive_attention(step)[0], rtol=0, atol=1e-12)
    assert (room[..., 1::2] == 7).all()


def test_a_query_that_wants_a_gradient_gets_none() -> None:
    step = small_step((1, 9))
    step.query.requires_grad_()

    out, _ = attend(step)

    assert not out.requires_grad


def test_it_comes_before_the_reference() -> None:
    names = [info.name for info in backend_info()]

    assert names.index("cpu") < names.index("torch") < names.index("reference")
