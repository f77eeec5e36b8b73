"""Where a text is cut does not depend on the pieces in which it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.engine.stop_strings import StopStrings
from pagedkv.errors import InvalidArgumentError


def naive(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """The stop that is complete first, of those the longest; found by looking at the whole text."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if keep else end - len(stop)], stop


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    keep=st.booleans(),
)
def test_any_pieces_are_cut_like_the_whole_text(pieces: list[str], stops: list[str], keep: bool) -> None:
    scanner = StopStrings(stops, keep=keep)

    emitted, stopped = "", None
    for piece in pieces:
        text, stopped = scanner.push(piece)
        emitted += text
    emitted += scanner.finish()

    assert (emitted, stopped) == naive("".join(pieces), stops, keep)
    assert scanner.stopped == stopped


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    scanner = StopStrings(stops)
    num_emitted = 0
    for end, character in enumerate(text, start=1):
        emitted, stopped = scanner.push(character)
        if stopped is not None:
            return
        num_emitted += len(emitted)
        beginnings = (size for stop in stops for size in range(len(stop)) if text[:end].endswith(stop[:size]))
        assert end - num_emitted == max(beginnings)


@given(
    skipped=st.text("ab", max_size=6),
    text=st.text("ab", max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_a_stop_may_begin_in_text_where_none_counts(skipped: str, text: str, stops: list[str]) -> None:
    scanner = StopStrings(stops)

    emitted = scanner.skip(skipped)
    more, stopped = scanner.push(text)
    emitted += more + scanner.finish()

    ends = range(len(skipped) + 1, len(skipped + text) + 1)
    found = [(end, -len(stop), stop) for end in ends for stop in stops if (skipped + text)[:end].endswith(stop)]
    end, negative_length, stop = min(found, default=(len(skipped + text), 0, None))
    assert (emitted, stopped) == ((skipped + text)[: end + negative_length], stop)


def test_what_may_be_the_beginning_of_a_stop_is_held_back() -> None:
    stops = StopStrings(["</s>"])

    assert stops.push("hi <") == ("hi ", None)
    assert stops.push("/") == ("", None)
    assert stops.push("p></") == ("</p>", None)
    assert stops.finish() == "</"


def test_a_stop_spans_pieces() -> None:
    stops = StopStrings(["END"])

    assert [stops.push(piece) for piece in ("the E", "N", "D of it", "more")] == [
        ("the ", None),
        ("", None),
        ("", "END"),
        ("", "END"),
    ]
    assert stops.finish() == ""


def test_a_stop_that_is_kept_ends_the_text_and_holds_nothing_back() -> None:
    stops = StopStrings(["END"], keep=True)

    assert stops.push("the EN") == ("the EN", None)
    assert stops.push("D of it") == ("D", "END")


def test_the_stop_that_is_complete_first_wins() -> None:
    assert StopStrings(["abcdef", "cd"]).push("xabcdef") == ("xab", "cd")


def test_of_stops_that_are_complete_together_the_longest_wins() -> None:
    assert StopStrings(["c", "abc", "bc"]).push("xabc") == ("x", "abc")


def test_a_failed_beginning_may_hold_the_next_one() -> None:
    assert StopStrings(["aab"]).push("aaab") == ("a", "aab")


def test_without_stops_everything_passes() -> None:
    stops = StopStrings(())

    assert stops.push("text") == ("text", None)
    assert stops.finish() == ""


@pytest.mark.parametrize("wrong", ["END", [""], ["a", 1]])
def test_wrong_stops_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidArgumentError, match="stops must be several non-empty str"):
        StopStrings(wrong)  # type: ignore[arg-type]
