from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.traces import Trace


def make(**changes: Any) -> Trace:
    columns: dict[str, Any] = {
        "arrival_s": [0.0, 1.0, 1.0],
        "prompt_tokens": [8, 6, 4],
        "output_tokens": [2, 0, 1],
        "content_block_size": 4,
        "content_runs": [[(0, 2)], [(0, 1), (7, 1)], [(0, 1)]],
        "clients": ["b", "a", "b"],
    }
    return Trace.from_columns(**(columns | changes))


def test_content_ids_are_expanded_from_runs() -> None:
    assert [make().content_ids(i).tolist() for i in range(3)] == [[0, 1], [0, 7], [0]]


def test_a_partial_block_may_have_no_id_and_a_request_none_at_all() -> None:
    trace = make(content_runs=[[(0, 2)], [(0, 1)], []])
    assert [trace.content_ids(i).tolist() for i in range(3)] == [[0, 1], [0], []]
    assert trace.num_content_ids().tolist() == [2, 1, 0]


@pytest.mark.parametrize("request_idx", [-1, 3])
def test_content_ids_of_a_request_that_does_not_exist_are_refused(request_idx: int) -> None:
    with pytest.raises(InvalidArgumentError, match="from 0 to 2"):
        make().content_ids(request_idx)


def test_names_of_clients_are_numbered_in_order_of_first_appearance() -> None:
    trace = make()
    assert trace.clients is not None
    assert trace.clients.tolist() == [0, 1, 0]
    assert trace.client_names == ("b", "a")


def test_columns_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make().arrival_s[0] = 3.0


def test_columns_are_copies() -> None:
    arrival_s = np.array([0.0, 1.0, 1.0])
    trace = make(arrival_s=arrival_s)
    arrival_s[0] = 0.5
    assert trace.arrival_s[0] == 0.0


def test_touching_runs_are_the_same_content_as_one() -> None:
    trace = make(content_runs=[[(0, 1), (1, 1)], [(0, 1), (7, 1)], [(0, 1)]])
    assert trace.has_same_requests(make())
    assert trace.digest == make().digest


@pytest.mark.parametrize(
    "change",
    [
        {"arrival_s": [0.0, 1.0, 2.0]},
        {"prompt_tokens": [8, 5, 4]},
        {"output_tokens": [2, 0, 2]},
        {"clients": None},
        {"clients": ["b", "c", "b"]},
        {"content_runs": [[(0, 2)], [(0, 1), (8, 1)], [(0, 1)]]},
        {"content_runs": None, "content_block_size": None},
        {"priorities": [0, 0, 1]},
    ],
)
def test_any_column_that_differs_makes_the_requests_differ(change: dict[str, Any]) -> None:
    assert not make(**change).has_same_requests(make())
    assert make(**change).digest != make().digest


def test_a_head_keeps_the_digest_and_says_so_in_its_name() -> None:
    head = make(name="three").head(1)
    assert len(head) == 1
    assert head.name == "three[:1]"
    assert head.digest == make().digest
    assert head.client_names == ("b",)
    assert head.run_starts.tolist() == [0]
    assert head.run_counts.tolist() == [2]


def test_priorities_that_are_all_0_are_none() -> None:
    assert make(priorities=[0, 0, 0]).priorities is None
    assert make(priorities=[0, 0, 0]).digest == make().digest
    assert make(priorities=[0, -1, 0]).head(2).priorities.tolist() == [0.0, -1.0]


def test_a_head_as_long_as_the_trace_is_the_trace() -> None:
    trace = make()
    assert trace.head(3) is trace
    with pytest.raises(InvalidArgumentError):
        trace.head(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": [0.0, 2.0, 1.0]}, r"request 2: expected arrivals in order \(not before 2.0 s\), found 1.0 s"),
        ({"arrival_s": [0.0, float("nan"), 1.0]}, "request 1: expected an arrival of 0 to 1e.09 s, found nan s"),
        ({"arrival_s": [-1.0, 0.0, 1.0]}, "request 0: expected an arrival of 0"),
        ({"arrival_s": [0.0, 1.0, 1e10]}, "request 2: expected an arrival of 0"),
        ({"prompt_tokens": [8, 0, 4]}, "request 1: expected prompt tokens of 1 to 16777216, found 0"),
        ({"prompt_tokens": [2**24 + 1, 6, 4]}, "request 0: expected prompt tokens"),
        ({"output_tokens": [2, 0, -1]}, "request 2: expected output tokens of 0 to 16777216, found -1"),
        ({"output_tokens": [2, 0]}, "output_tokens: expected 3 values, found 2"),
        ({"prompt_tokens": [8.0, 6.0, 4.0]}, "prompt_tokens: expected int64"),
        ({"prompt_tokens": [[8], [6], [4]]}, "prompt_tokens: expected one dimension, found 2"),
        (
            {"prompt_tokens": np.array([8, 6, 2**63], dtype=np.uint64)},
            "prompt_tokens: expected int64, found 9223372036854775808",
        ),
        ({"prompt_tokens": [8, 6, 2**70]}, "prompt_tokens: expected int64"),
        ({"prompt_tokens": [[8], [6, 4]]}, "prompt_tokens: expected numbers"),
        ({"arrival_s": ["0", "1", "1"]}, "arrival_s: expected float64"),
        ({"priorities": [0, 1]}, "priorities: expected 3 values, found 2"),
        ({"priorities": [0, float("nan"), 1]}, "request 1: expected a finite priority, found nan"),
        ({"clients": [0, 1, -1]}, "request 2: expected a client of 0"),
        ({"clients": ["a", "b", "\ud800"]}, "clients: expected valid Unicode names"),
        ({"content_block_size": None}, "expected a content block size with content ids, found none"),
        ({"content_block_size": 0}, "expected a content block size of 1"),
        ({"content_runs": [[(0, 2)]]}, "content runs: expected one list for each of 3 requests, found 1"),
        ({"content_runs": [[(0, 2, 1)], [], []]}, r"expected \(start, count\) pairs"),
        (
            {"content_runs": [[(0, 3)], [], []]},
            "request 0: expected 2 content ids for 8 tokens in blocks of 4, found 3",
        ),
        ({"content_runs": [[], [(0, 0), (0, 2)], []]}, "request 1: expected runs of 1 or more content ids"),
        ({"content_runs": [[(-1, 2)], [], []]}, "request 0: expected runs of 1 or more content ids"),
        ({"content_runs": [[(2**62 - 1, 2)], [], []]}, "request 0: expected runs of 1 or more content ids"),
        ({"content_runs": [[(2**63 - 1, 2)], [], []]}, "request 0: expected runs of 1 or more content ids"),
        ({"content_runs": [[(0, 2)], [(1, 1)], []]}, "request 1: expected prefix ids"),
    ],
)
def test_columns_that_contradict_the_promises_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(**change)


def test_a_trace_without_requests_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one request"):
        Trace.from_columns([], [], [])


def test_description_counts_load_lengths_clients_and_reuse() -> None:
    description = make(name="three").describe()
    assert description | {"digest": "-"} == {
        "name": "three",
        "format": "generated",
        "digest": "-",
        "num_requests": 3,
        "num_prefill_only": 1,
        "span_s": 1.0,
        "requests_per_s": 3.0,
        "interarrival_cv": 1.0,
        "prompt_tokens": {"mean": 6.0, "p50": 6.0, "p90": 7.6, "p99": 7.96, "max": 8, "total": 18},
        "output_tokens": {"mean": 1.0, "p50": 1.0, "p90": 1.8, "p99": pytest.approx(1.98), "max": 2, "total": 3},
        "max_request_tokens": 10,
        "num_clients": 2,
        "content": {
            "block_size": 4,
            "num_blocks": 5,
            "num_unique_blocks": 3,
            "block_hit_ratio": 0.4,
            "token_hit_ratio": 8 / 18,
        },
    }


def test_a_hit_on_a_partial_block_counts_its_tokens_only() -> None:
    trace = make(prompt_tokens=[6, 6, 4], content_runs=[[(0, 2)], [(0, 2)], [(0, 1)]])
    assert trace.describe()["content"]["token_hit_ratio"] == 10 / 16


def test_a_single_request_has_no_rate() -> None:
    description = Trace.from_columns([5.0], [1], [1]).describe()
    assert description["requests_per_s"] is None
    assert description["interarrival_cv"] is None
    assert description["content"] is None
