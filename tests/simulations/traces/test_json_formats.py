from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Load, LoadError


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": 513, "output_length": 2, "hash_ids": [0, 1]} | changes


def qwen(**changes: Any) -> dict[str, Any]:
    row = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 17, "output_length": 2}
    return row | {"type": "text", "turn": 1, "hash_ids": [5, 6]} | changes


def plain(**changes: Any) -> dict[str, Any]:
    return {"arrival_s": 0.5, "prompt_tokens": 5, "output_tokens": 2} | changes


def test_mooncake_timestamps_are_milliseconds(load: Load) -> None:
    trace = load(lines(mooncake(), mooncake(timestamp=3000, hash_ids=[0, 2])))
    assert trace.format == "mooncake"
    assert trace.arrival_s.tolist() == [0.0, 3.0]
    assert trace.content_block_size == 512
    assert trace.content_ids(1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash_ids": [0]}, "expected 2 hash_ids for 513 tokens in blocks of 512, found 1"),
        ({"hash_ids": [0, 1, 2]}, "expected 2 hash_ids for 513 tokens in blocks of 512, found 3"),
        ({"hash_ids": [0, -1]}, "expected runs of 1 or more content ids of 0 to 4611686018427387903, found a run of 1"),
        ({"hash_ids": [0, 2**62]}, "expected runs of 1 or more content ids of 0 to 4611686018427387903"),
        ({"hash_ids": [0, 2**63]}, "expected content ids within 64 bits, found 9223372036854775808"),
        ({"hash_ids": [0, 2**70]}, "expected content ids within 64 bits, found 1180591620717411303424"),
        ({"hash_ids": [9, 1]}, "expected prefix ids (each id always after the same ids), found id 1 after different"),
        ({"hash_ids": [0, 1.0]}, "expected `int` at `$.hash_ids[1]`, found `float`"),
        ({"hash_ids": "0 1"}, "expected `array` at `$.hash_ids`, found `str`"),
        ({"timestamp": -1}, "expected an arrival of 0 to 1e+09 s, found -0.001 s"),
        ({"timestamp": 1e30}, "expected an arrival of 0 to 1e+09 s, found 1e+27 s"),
        ({"timestamp": "0"}, "expected `float` at `$.timestamp`, found `str`"),
        ({"timestamp": None}, "expected `float` at `$.timestamp`, found `null`"),
        ({"timestamp": 2}, "expected arrivals in order (not before 0.005 s), found 0.002 s"),
        ({"input_length": 513.0}, "expected `int` at `$.input_length`, found `float`"),
        ({"input_length": True}, "expected `int` at `$.input_length`, found `bool`"),
        ({"input_length": 0, "hash_ids": []}, "expected prompt tokens of 1 to 16777216, found 0"),
        ({"output_length": -1}, "expected output tokens of 0 to 16777216, found -1"),
        ({"output_length": 2**63}, "expected output_length within 64 bits, found 9223372036854775808"),
    ],
)
def test_a_row_that_cannot_be_is_an_error_on_its_line(
    load_error: LoadError, change: dict[str, Any], message: str
) -> None:
    rows = lines(mooncake(timestamp=5), mooncake(**{"timestamp": 5} | change), mooncake(timestamp=5))
    assert load_error(rows).startswith(f"trace:2: {message}")


@pytest.mark.parametrize("key", ["timestamp", "input_length", "output_length", "hash_ids"])
def test_a_missing_key_is_an_error_on_its_line(load_error: LoadError, key: str) -> None:
    row = mooncake()
    del row[key]
    assert load_error(lines(mooncake(), row)) == f"trace:2: expected a key `{key}`, found none"


@pytest.mark.parametrize(
    "twin",
    [
        '{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[0],"input_length":2}',
        '{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[0],"\\u0069nput_length" : 2}',
        '{"input_length":2,"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[0],"note":"::"}',
    ],
)
def test_a_key_twice_is_an_error_on_its_line(load_error: LoadError, twin: str) -> None:
    assert load_error(lines(mooncake()) + twin) == "trace:2: expected each key once, found key 'input_length' twice"


def test_a_key_twice_inside_an_ignored_value_is_an_error_too(load_error: LoadError) -> None:
    assert "found key 'a' twice" in load_error(lines(mooncake())[:-2] + ',"more":{"a":1,"a":2}}')


def test_keys_of_no_interest_are_ignored(load: Load) -> None:
    assert len(load(lines(mooncake(note="a:b", more={"a": 9**5000 % 10**4000})))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected `object`, found `array`"),
        ("17", "expected `object`, found `int`"),
        ("{", "expected a JSON object (Input data was truncated), found '{'"),
        ('{"timestamp": NaN}', "expected a JSON object (JSON is malformed: invalid character (byte 14))"),
        ('{"timestamp": 1e999}', "expected a valid value at `$.timestamp`, found number out of range"),
        (json.dumps(mooncake()) + " x", "expected a JSON object (JSON is malformed: trailing characters"),
    ],
)
def test_a_line_that_is_no_object_is_an_error(load_error: LoadError, line: str, message: str) -> None:
    assert load_error(lines(mooncake()) + line).startswith(f"trace:2: {message}")


@pytest.mark.parametrize("deep", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
def test_json_of_great_depth_is_an_error(load_error: LoadError, deep: str) -> None:
    row = lines(mooncake())[:-2] + f',"more":{deep}}}'
    assert load_error(row).startswith("trace:1: expected JSON of moderate depth, found '{")
    assert load_error(lines(mooncake()) + row).startswith("trace:2: expected JSON of moderate depth, found '{")


def test_qwen_ids_of_single_blocks_become_prefix_ids(load: Load) -> None:
    trace = load(lines(qwen(), qwen(hash_ids=[7, 6]), qwen(hash_ids=[5, 6])))
    assert trace.format == "qwen_bailian"
    assert trace.content_block_size == 16
    assert [trace.content_ids(i).tolist() for i in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_qwen_ids_that_are_prefix_ids_stay_as_they_are(load: Load) -> None:
    trace = load(lines(qwen(), qwen(hash_ids=[5, 7])))
    assert [trace.content_ids(i).tolist() for i in range(2)] == [[5, 6], [5, 7]]


@pytest.mark.parametrize("ids", [[5, -6], [5, 2**62], [5]])
def test_qwen_ids_that_cannot_be_are_an_error(load_error: LoadError, ids: list[int]) -> None:
    ids = ids if len(ids) > 1 else [1, 2, 3]
    assert load_error(lines(qwen(), qwen(hash_ids=ids))).startswith("trace:2: expected ")


def test_a_qwen_key_twice_is_an_error(load_error: LoadError) -> None:
    assert "found key 'turn' twice" in load_error(lines(qwen())[:-2] + ', "turn": 3}')


def test_plain_rows_name_arrivals_in_seconds(load: Load) -> None:
    trace = load(lines(plain(), plain(arrival_s=1)))
    assert trace.format == "jsonl"
    assert trace.arrival_s.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("content", [{"hash_ids": [3, 4]}, {"hash_runs": [[3, 2]]}, {"hash_runs": [[3, 1], [4, 1]]}])
def test_plain_content_is_a_list_of_ids_or_of_runs(load: Load, content: dict[str, Any]) -> None:
    trace = load(lines(plain(), plain(hash_block_size=4, **content)))
    assert trace.content_block_size == 4
    assert trace.content_ids(0).tolist() == []
    assert trace.content_ids(1).tolist() == [3, 4]
    assert trace.run_starts.tolist() == [3]


def test_plain_clients_are_numbers_or_names(load: Load) -> None:
    numbers, names = (load(lines(plain(client=first), plain(client=second))) for first, second in [(9, 3), ("b", "9")])
    assert (numbers.clients is not None, names.clients is not None) == (True, True)
    assert (numbers.clients.tolist(), numbers.client_names) == ([9, 3], ())  # type: ignore[union-attr]
    assert (names.clients.tolist(), names.client_names) == ([0, 1], ("b", "9"))  # type: ignore[union-attr]


def test_plain_priorities_are_numbers_and_0_where_none_is_given(load: Load) -> None:
    trace = load(lines(plain(priority=2), plain(), plain(priority=-0.5)))
    assert trace.priorities is not None
    assert trace.priorities.tolist() == [2.0, 0.0, -0.5]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"priority": "high"}, "expected `float` at `$.priority`, found `str`"),
        ({"client": 1}, {"client": "a"}, "expected a client's number, as in line 1, found a client's name"),
        ({"client": "a"}, {}, "expected a client's name, as in line 1, found no client"),
        ({}, {"client": 1}, "expected no client, as in line 1, found a client's number"),
        ({"client": 1}, {"client": -1}, "expected a client of 0 to 4611686018427387903, found -1"),
        ({"client": 1}, {"client": 2**64}, "expected client within 64 bits, found 18446744073709551616"),
        ({"client": 1}, {"client": None}, "expected `int | str` at `$.client`, found `null`"),
        ({}, {"hash_ids": [1, 2]}, "expected a key `hash_block_size` beside `hash_ids`, found none"),
        ({}, {"hash_runs": [[1, 2]]}, "expected a key `hash_block_size` beside `hash_runs`, found none"),
        (
            {"hash_ids": [1, 2], "hash_block_size": 4},
            {"hash_runs": [[1, 2]], "hash_block_size": 4},
            "expected either `hash_ids` or `hash_runs` in the whole file, found both",
        ),
        (
            {},
            {"hash_ids": [1, 2], "hash_runs": [[1, 2]], "hash_block_size": 4},
            "expected either `hash_ids` or `hash_runs` in the whole file, found both",
        ),
        (
            {"hash_ids": [1, 2], "hash_block_size": 4},
            {"hash_ids": [1, 2], "hash_block_size": 3},
            "expected the block size 4 of the lines before, found 3",
        ),
        ({}, {"hash_runs": [[1, 2, 3]], "hash_block_size": 4}, "expected `array` of length 2 at `$.hash_runs[0]`"),
        ({}, {"hash_runs": [[1, 0], [1, 2]], "hash_block_size": 4}, "expected runs of 1 or more content ids"),
        (
            {},
            {"hash_runs": [[1, 2**64]], "hash_block_size": 4},
            "expected runs within 64 bits, found 184467440737095516",
        ),
    ],
)
def test_plain_rows_that_cannot_be_are_an_error(
    load_error: LoadError, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    assert load_error(lines(plain(**first), plain(**second))).startswith(f"trace:2: {message}")
