"""Prompt look-up guesses what a naive search through the text would find."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import InvalidArgumentError, UnknownIdError
from pagedkv.engine.speculation import NgramDrafter
from pagedkv.errors import ConfigError

KEY = ("a", 0)


def guess(drafter: NgramDrafter, text: list[int], limit: int = 64) -> list[int]:
    drafter.begin(KEY, text)
    return propose(drafter, limit)


def propose(drafter: NgramDrafter, limit: int = 64) -> list[int]:
    return drafter.propose([KEY], [limit])[0].tolist()


def search(text: list[int], num: int, max_ngram: int, min_ngram: int, lookback: int) -> list[int]:
    """Look at every earlier place, latest first, for the longest n-gram first."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for place in range(len(text) - 1, max(size, len(text) - lookback) - 1, -1):
            if size < len(text) and text[place - size : place] == text[-size:]:
                period = text[place:]
                return [period[nth % len(period)] for nth in range(num)]
    return []


def test_it_proposes_what_followed_the_last_tokens_before() -> None:
    assert guess(NgramDrafter(num_drafts=4), [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == [4, 5, 6, 9]


def test_the_latest_place_counts() -> None:
    assert guess(NgramDrafter(num_drafts=1), [1, 2, 7, 1, 2, 8, 1, 2]) == [8]


def test_the_longest_match_counts_before_the_latest() -> None:
    # "1 2 3" was followed by 7, "2 3" later by 8.
    assert guess(NgramDrafter(num_drafts=1), [1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3]) == [7]


def test_a_match_that_is_too_short_is_none() -> None:
    assert guess(NgramDrafter(min_ngram=2), [1, 2, 3, 9, 3]) == []
    assert guess(NgramDrafter(num_drafts=2, min_ngram=1), [1, 2, 3, 9, 3]) == [9, 3]


def test_where_the_text_ends_its_period_goes_on() -> None:
    assert guess(NgramDrafter(num_drafts=5, max_ngram=2), [1, 2, 3, 1, 2, 3, 1, 2]) == [3, 1, 2, 3, 1]


def test_it_proposes_no_more_than_is_asked_for() -> None:
    drafter = NgramDrafter(num_drafts=3)

    assert guess(drafter, [1, 2, 3, 4, 5, 1, 2], limit=2) == [3, 4]
    assert propose(drafter, 0) == []
    assert propose(drafter, 9) == [3, 4, 5]


def test_a_new_token_changes_the_guess() -> None:
    drafter = NgramDrafter(num_drafts=2, max_ngram=2)
    drafter.begin(KEY, [1, 2, 3, 4, 5, 6, 1, 2])

    drafter.extend(KEY, [3])

    assert propose(drafter) == [4, 5]
    drafter.extend(KEY, [9])
    assert propose(drafter) == []


def test_samples_do_not_learn_from_each_other() -> None:
    drafter = NgramDrafter()
    drafter.begin(("a", 0), [1, 2, 3, 4])
    drafter.begin(("a", 1), [1, 2])

    assert drafter.propose([("a", 1), ("a", 0)], [4, 4])[0].tolist() == []


def test_beginning_again_forgets_what_was_known() -> None:
    drafter = NgramDrafter()
    drafter.begin(KEY, [1, 2, 3, 1, 2])

    drafter.begin(KEY, [1, 2])

    assert propose(drafter) == []


def test_what_lies_further_back_is_not_found_and_not_kept() -> None:
    drafter = NgramDrafter(num_drafts=1, max_ngram=2, lookback=4)

    assert guess(drafter, [1, 2, 3, 9, 1, 2]) == [3]
    assert guess(drafter, [1, 2, 3, 9, 9, 1, 2]) == []
    for token in range(1000):
        drafter.extend(KEY, [token])
    assert [len(index) for _, index in drafter._texts[KEY]._indices] == [4]


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    num_drafts=st.integers(1, 6),
    lookback=st.integers(1, 30),
)
def test_it_finds_what_a_naive_search_finds(
    pieces: list[list[int]], sizes: list[int], num_drafts: int, lookback: int
) -> None:
    drafter = NgramDrafter(num_drafts=num_drafts, min_ngram=sizes[0], max_ngram=sizes[1], lookback=lookback)
    text: list[int] = []
    for piece in pieces:
        drafter.extend(KEY, piece) if text else drafter.begin(KEY, piece)
        text += piece
        assert propose(drafter) == search(text, num_drafts, sizes[1], sizes[0], lookback)


def test_a_sample_that_ended_is_unknown_and_ending_it_again_does_nothing() -> None:
    drafter = NgramDrafter()
    drafter.begin(KEY, [1])
    drafter.end(KEY)

    drafter.end(KEY)

    with pytest.raises(UnknownIdError, match=r"no sample \('a', 0\) was begun"):
        drafter.propose([KEY], [1])
    with pytest.raises(UnknownIdError):
        drafter.extend(KEY, [1])


@pytest.mark.parametrize(
    ("keys", "limits", "message"),
    [
        ([KEY], [1, 2], "1 keys need as many max_drafts, found 2"),
        ([KEY, KEY], [1, 1], "found a key twice"),
        ([KEY], [-1], "max_drafts must be in 0..2147483647, found -1"),
    ],
)
def test_wrong_arguments_are_refused(keys: list[tuple[str, int]], limits: list[int], message: str) -> None:
    drafter = NgramDrafter()
    drafter.begin(KEY, [1])

    with pytest.raises(InvalidArgumentError, match=message):
        drafter.propose(keys, limits)


def test_a_sample_has_a_token() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one token"):
        NgramDrafter().begin(KEY, [])


@pytest.mark.parametrize(
    "options", [{"num_drafts": 0}, {"max_ngram": 0}, {"min_ngram": 4}, {"min_ngram": 0}, {"lookback": 0}]
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        NgramDrafter(**options)
