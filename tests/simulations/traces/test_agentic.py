from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Load, LoadError


def request(t: float, tokens: int, *runs: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"t": t, "in": tokens, "out": 1, "runs": [list(run) for run in runs], **more}


def session(name: str, *requests: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": name, "block_size": 4, "hash_id_scope": "local", "requests": list(requests)} | changes


def lines(*sessions: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in sessions)


TWO = lines(
    session("a", request(0.0, 9, (0, 2)), request(5.0, 13, (0, 3), api_time=1.5, stop="tool_use")),
    session("b", request(0.0, 4, (1, 1)), request(3.0, 8, (1, 1), (9, 1), type="s")),
)


def test_sessions_start_together_and_merge_by_arrival_with_ties_in_file_order(load: Load) -> None:
    trace = load(TWO)
    assert trace.format == "agentic"
    assert trace.arrival_s.tolist() == [0.0, 0.0, 3.0, 5.0]
    assert trace.prompt_tokens.tolist() == [9, 4, 8, 13]
    assert trace.clients is not None
    assert trace.clients.tolist() == [0, 1, 1, 0]
    assert trace.client_names == ("a", "b")


def test_a_gap_staggers_the_sessions(load: Load) -> None:
    trace = load(TWO, session_gap_s=10.0)
    assert trace.session_gap_s == 10.0
    assert trace.arrival_s.tolist() == [0.0, 5.0, 10.0, 13.0]
    assert trace.prompt_tokens.tolist() == [9, 13, 4, 8]


def test_local_ids_of_two_sessions_never_meet(load: Load) -> None:
    trace = load(TWO)
    # Session a uses ids 0 to 2, so those of session b move by 3.
    assert [trace.content_ids(i).tolist() for i in range(4)] == [[0, 1], [4], [4, 12], [0, 1, 2]]


def test_global_ids_stay(load: Load) -> None:
    one = session("a", request(0.0, 4, (0, 1)), hash_id_scope="global")
    two = session("b", request(0.0, 8, (0, 2)), hash_id_scope="global")
    trace = load(lines(one, two))
    assert trace.content_ids(1).tolist() == [0, 1]
    assert trace.describe()["content"]["num_unique_blocks"] == 2


def test_requests_of_a_subagent_count_their_time_from_its_start(load: Load) -> None:
    subagent = {
        "t": 2.0,
        "type": "subagent",
        "duration_ms": None,
        "requests": [request(0.0, 4), request(1.5, 5, (7, 1))],
    }
    subagent["requests"][0]["runs"] = [[7, 1]]  # type: ignore[index]
    trace = load(lines(session("a", request(0.0, 4, (0, 1)), subagent, request(3.0, 8, (0, 2)))))
    assert trace.arrival_s.tolist() == [0.0, 2.0, 3.0, 3.5]
    assert trace.prompt_tokens.tolist() == [4, 4, 8, 5]
    assert trace.content_ids(3).tolist() == [7]
    assert trace.clients is not None
    assert trace.clients.tolist() == [0, 0, 0, 0]


def test_clients_are_numbered_by_first_arrival(load: Load) -> None:
    trace = load(lines(session("late", request(9.0, 1)), session("none"), session("early", request(1.0, 1))))
    assert trace.client_names == ("early", "late")
    assert trace.clients is not None
    assert trace.clients.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (session("a", request(0.0, 1)), "expected a session id of its own, found 'a' again"),
        (session("b", request(0.0, 1), block_size=8), "expected the block size 4 of the lines before, found 8"),
        (session("b", request(2.0, 1), request(1.0, 1)), "expected times in order within a session (not before 2.0 s)"),
        (session("b", request(-1.0, 1)), "expected times in order within a session (not before 0.0 s), found -1.0 s"),
        (session("b", request(1e30, 1)), "expected an arrival of 0 to 1e+09 s, found 1e+30 s"),
        (session("b", request(0.0, 0)), "expected prompt tokens of 1 to 16777216, found 0"),
        (session("b", request(0.0, 2**63)), "expected runs of 2305843009213693952 ids for 9223372036854775808 tokens"),
        (session("b", request(0.0, 9, (0, 3))), "expected runs of 2 ids for 9 tokens in full blocks of 4, found 3"),
        (session("b", request(0.0, 9, (0, 1))), "expected runs of 2 ids for 9 tokens in full blocks of 4, found 1"),
        (session("b", request(0.0, 8, (0, 0), (0, 2))), "expected runs [start ≥ 0, count ≥ 1], found [0, 0]"),
        (session("b", request(0.0, 8, (-1, 2))), "expected runs [start ≥ 0, count ≥ 1], found [-1, 2]"),
        (session("b", request(0.0, 8, (2**62, 2))), "expected content ids of all sessions within 4611686018427387903"),
        (session("b", request(0.0, 8, (0, 2), (5, 2**70))), "expected runs [start ≥ 0, count ≥ 1], found [5, 11805916"),
        (session("b", request(0.0, 8, (0, 2)), request(0.0, 8, (3, 1), (1, 1))), "expected prefix ids"),
        (session("b", {"t": 0.0, "type": "subagent"}), "expected a key `requests` in a subagent, found none"),
        (session("b", {"t": 0.0, "in": 1}), "expected the keys `in`, `out` and `runs` in a request, found not all"),
        (
            session("b", request(0.0, 1), hash_id_scope="x"),
            "expected a valid value at `$.hash_id_scope`, found invalid",
        ),
        (session("b", request(0.0, 1, [1])), "expected `array` of length 2 at `$.requests[0].runs[0]`"),  # type: ignore[arg-type]
        (session("b", request(0.0, 1), id=5), "expected `str` at `$.id`, found `int`"),
    ],
)
def test_a_session_that_cannot_be_is_an_error_on_its_line(
    load_error: LoadError, second: dict[str, Any], message: str
) -> None:
    assert load_error(lines(session("a", request(0.0, 1)), second)).startswith(f"trace:2: {message}")


def test_a_block_size_of_zero_is_an_error(load_error: LoadError) -> None:
    assert "expected a block size of 1 to 16777216, found 0" in load_error(lines(session("a", block_size=0)))


def test_a_key_twice_deep_in_a_session_is_an_error(load_error: LoadError) -> None:
    text = '{"id":"a","block_size":4,"requests":[{"t":0,"in":1,"out":1,"runs":[],"in":2}]}'
    assert load_error(text) == "trace:1: expected each key once, found key 'in' twice"


def test_sessions_without_a_single_request_are_an_error(load_error: LoadError) -> None:
    assert load_error(lines(session("a"))) == "trace: expected at least one request, found none"
