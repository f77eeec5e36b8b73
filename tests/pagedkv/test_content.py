import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, SimulatedPrompt
from pagedkv.content import SimulatedContent, TokenContent

ROOT = bytes(32)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def content_of(*values: int) -> TokenContent:
    return TokenContent(tokens(*values), 2, ROOT)


def test_keys_hashed_one_by_one_equal_keys_hashed_at_once() -> None:
    content = content_of(1, 2, 3, 4, 5, 6)
    one_by_one = [content.key(0), content.key(1), content.key(2)]
    assert one_by_one == list(content_of(1, 2, 3, 4, 5, 6).keys(3))


def test_writing_in_the_middle_replaces_the_rest_and_its_names() -> None:
    content = content_of(1, 2, 3, 4, 5, 6)
    old = list(content.keys(3))
    content.write(2, tokens(3, 9, 5, 6))
    assert content.token_ids(0, 6).tolist() == [1, 2, 3, 9, 5, 6]
    assert content.keys(3)[0] == old[0]
    assert list(content.keys(3)) == list(content_of(1, 2, 3, 9, 5, 6).keys(3))


def test_writing_inside_a_block_drops_the_name_of_that_block() -> None:
    content = content_of(1, 2, 3, 4)
    content.keys(2)
    content.write(3, tokens(9))
    assert list(content.keys(2)) == list(content_of(1, 2, 3, 9).keys(2))


@pytest.mark.parametrize("num_hashed", [0, 1, 2])
def test_a_block_written_whole_replaces_the_rest_and_has_the_name_of_its_tokens(num_hashed: int) -> None:
    content = content_of(1, 2, 3, 4)
    content.keys(num_hashed)
    content.write_block(1, tokens(3, 9).tobytes())
    content.write_block(2, tokens(5, 6).tobytes())
    assert content.token_ids(0, 6).tolist() == [1, 2, 3, 9, 5, 6]
    assert [content.key(i) for i in range(3)] == list(content_of(1, 2, 3, 9, 5, 6).keys(3))


def test_a_fork_continues_on_its_own() -> None:
    content = content_of(1, 2, 3, 4)
    content.keys(2)
    child = content.fork(3)
    child.write(2, tokens(3, 9))
    assert content.token_ids(0, 4).tolist() == [1, 2, 3, 4]
    assert list(child.keys(2)) == list(content_of(1, 2, 3, 9).keys(2))


@given(st.lists(st.tuples(st.integers(0, 8), st.lists(st.integers(0, 1), max_size=5)), max_size=6))
def test_keys_after_any_writes_equal_keys_of_the_same_tokens_from_scratch(
    writes: list[tuple[int, list[int]]],
) -> None:
    values = [0, 1, 0, 1, 0, 1, 0, 1]
    content = content_of(*values)
    for start, new in writes:
        start = min(start, len(values))
        content.keys(len(values) // 2)
        content.write(start, tokens(*new))
        values = values[:start] + new
        assert content.token_ids(0, len(values)).tolist() == values
        num_full = len(values) // 2
        assert list(content.keys(num_full))[:num_full] == list(content_of(*values).keys(num_full))


def test_ids_of_a_simulated_prompt_name_its_full_blocks() -> None:
    assert SimulatedPrompt(5, [7, 8, 9], 2).block_keys(2) == [7, 8]


def test_an_id_that_covers_several_blocks_names_each_part() -> None:
    assert SimulatedPrompt(7, [7, 8], 4).block_keys(2) == [14, 15, 16]


def test_the_last_id_inside_a_larger_block_names_it() -> None:
    assert SimulatedPrompt(10, [5, 6, 7, 8, 9], 2).block_keys(4) == [6, 8]


def test_large_ids_do_not_wrap_around_into_small_ones() -> None:
    keys = SimulatedPrompt(16, [2**61, 0], 8).block_keys(1)
    assert keys == [2**64, 2**64 + 1, 2**64 + 2, 2**64 + 3, 2**64 + 4, 2**64 + 5, 2**64 + 6, 2**64 + 7, *range(8)]


def test_a_simulated_prompt_without_ids_names_nothing() -> None:
    assert SimulatedPrompt(100).block_keys(2) == []


def test_a_block_size_that_does_not_fit_the_ids_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="block_size 4 must divide"):
        SimulatedPrompt(12, [1, 2], 6).block_keys(4)


@pytest.mark.parametrize("num_tokens", [0, -1, 2**26 + 1, 2**70, 1.0, float("nan"), True, None, "3"])
def test_a_simulated_prompt_refuses_an_impossible_length(num_tokens: object) -> None:
    with pytest.raises(InvalidArgumentError, match="num_tokens"):
        SimulatedPrompt(num_tokens)


@pytest.mark.parametrize(
    ("content_ids", "content_block_size"),
    [
        ([1], 2),
        ([1, 2, 3], 2),
        ([1, 2], 0),
        ([1, 2], -2),
        ([1, 2], 2.0),
        ([1, 2], True),
        ([1, -1], 2),
        ([1, 2**62], 2),
        ([1, 2**70], 2),
        ([1.0, 2.0], 2),
        ([1, float("nan")], 2),
        ([True, False], 2),
        ([7, 7], 2),
        (["1", "2"], 2),
        ([[1], [2]], 2),
        ([[1], [2, 3]], 2),
        (None, 2),
        (5, 2),
    ],
)
def test_a_simulated_prompt_refuses_ids_that_do_not_fit(content_ids: object, content_block_size: object) -> None:
    with pytest.raises(InvalidArgumentError):
        SimulatedPrompt(4, content_ids, content_block_size)


def test_the_largest_simulated_prompt_is_accepted() -> None:
    assert SimulatedPrompt(2**26).num_tokens == 2**26
    assert SimulatedPrompt(2, [2**62 - 1, 0], 1).block_keys(1) == [2**62 - 1, 0]


def test_names_beyond_the_prompt_are_the_sequence_s_own() -> None:
    one, other = SimulatedContent([7], 1), SimulatedContent([7], 2)
    assert one.keys(1)[0] == other.keys(1)[0] == 7
    assert not set(list(one.keys(4))[1:4]) & set(list(other.keys(4))[1:4])


@pytest.mark.parametrize("prompt_keys", [[], [7], [7, 8, 9]])
def test_a_simulated_name_is_the_same_alone_and_in_a_row(prompt_keys: list[int]) -> None:
    content = SimulatedContent(prompt_keys, 3)
    assert list(content.keys(5))[:5] == [content.key(0), content.key(1), content.key(2), content.key(3), content.key(4)]


def test_own_names_of_neighbouring_serials_never_meet() -> None:
    last_of_first = SimulatedContent([], 1).key(2**26 - 1)
    first_of_second = SimulatedContent([], 2).key(0)
    assert first_of_second == last_of_first - 1


def test_a_simulated_fork_shares_names_up_to_the_fork_only() -> None:
    content = SimulatedContent([7], 1)
    child = content.fork(2, 5)
    assert list(child.keys(2))[:2] == list(content.keys(2))[:2]
    assert child.key(2) != content.key(2)


def test_a_simulated_sequence_that_was_cut_gets_new_names_after_the_cut() -> None:
    content = SimulatedContent([7, 8], 1)
    old = [content.key(0), content.key(1), content.key(2)]
    content.truncate(1, 6)
    assert content.key(0) == old[0]
    assert content.key(1) not in old
    assert content.key(2) not in old


def test_a_truncated_simulated_sequence_goes_on_under_other_names() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=6, block_size=2))
    for sequence_id in ("a", "b"):
        manager.open(sequence_id, SimulatedPrompt(4, [7, 8], 2))
        manager.append(sequence_id, 4 - manager.num_computed(sequence_id))
    manager.truncate("a", 2)
    manager.extend("a", 2)
    manager.append("a", 2)

    row = manager.row("a")
    first, second = manager.memory.sequences.content(row).keys(2)[:2]
    assert (first, second < 0) == (7, True)
    manager.check_invariants()
