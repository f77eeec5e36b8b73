from __future__ import annotations

import pytest

from .conftest import Load, LoadError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n"
CLIENTS = "arrival_s,client,prompt_tokens,output_tokens\n"
IDS = "arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block_size\n"


def test_azure_arrivals_count_from_the_first_row_to_a_tenth_of_a_microsecond(load: Load) -> None:
    trace = load(AZURE + "2023-11-16 23:59:59.9999999,374,44\r\n2023-11-17 00:00:00.0000001,396,109\r\n")
    assert trace.format == "azure"
    assert trace.arrival_s.tolist() == [0.0, 2e-7]
    assert trace.prompt_tokens.tolist() == [374, 396]
    assert trace.output_tokens.tolist() == [44, 109]
    assert trace.clients is None


def test_azure_rows_of_2024_name_their_offset_from_utc(load: Load) -> None:
    trace = load(AZURE + "2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:01+00:00,1,1\n")
    assert trace.arrival_s.tolist() == [0.0, 0.99007]


@pytest.mark.parametrize(
    "timestamp",
    ["", "now", "NaT", "2023-11-16", "2023-11-16T18:15:46", "2023-11-16 18:15:46.", "1700158546", "2023-1-16 18:15:46"],
)
def test_what_is_not_a_timestamp_is_an_error(load_error: LoadError, timestamp: str) -> None:
    expected = f"trace:2: expected a timestamp 'YYYY-MM-DD HH:MM:SS.fffffff', found '{timestamp}'"
    assert load_error(AZURE + f"{timestamp},1,1") == expected


@pytest.mark.parametrize("timestamp", ["2023-02-29 00:00:00", "2023-11-16 24:00:00", "2023-00-01 00:00:00"])
def test_a_date_that_does_not_exist_is_an_error_on_its_line(load_error: LoadError, timestamp: str) -> None:
    rows = f"2023-01-01 00:00:00,1,1\n{timestamp},1,1\n"
    assert load_error(AZURE + rows) == f"trace:3: expected a date and time that exist, found '{timestamp}'"


def test_azure_rows_out_of_order_are_an_error(load_error: LoadError) -> None:
    rows = "2023-11-16 00:00:05,1,1\n2023-11-16 00:00:07,1,1\n2023-11-16 00:00:06,1,1\n"
    assert load_error(AZURE + rows) == "trace:4: expected arrivals in order (not before 2.0 s), found 1.0 s"
    assert load_error(AZURE + "2023-11-16 00:00:05,1,1\n2023-11-16 00:00:04,1,1\n").startswith(
        "trace:3: expected a time"
    )
    assert load_error(AZURE + "0001-01-01 00:00:00,1,1\n9999-01-01 00:00:00,1,1\n").startswith(
        "trace:3: expected a time"
    )


def test_burstgpt_keeps_failed_requests_as_prefill_only(load: Load) -> None:
    trace = load(BURST + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,30,0,30,API log\n")
    assert trace.format == "burstgpt"
    assert trace.arrival_s.tolist() == [5.0, 45.0]
    assert trace.prompt_tokens.tolist() == [472, 30]
    assert trace.output_tokens.tolist() == [18, 0]
    assert trace.describe()["num_prefill_only"] == 1


def test_burstgpt_version_2_has_two_more_columns(load: Load) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace = load(header + "0.5,,1.2,ChatGPT,7,8,15,API log\n")
    assert (trace.arrival_s[0], trace.prompt_tokens[0], trace.output_tokens[0]) == (0.5, 7, 8)


def test_plain_columns_come_in_any_order_and_others_are_ignored(load: Load) -> None:
    trace = load('note,output_tokens,arrival_s,prompt_tokens\n"a, b",1,0.25,2\n')
    assert trace.format == "csv"
    assert (trace.arrival_s[0], trace.prompt_tokens[0], trace.output_tokens[0]) == (0.25, 2, 1)


def test_clients_that_are_all_whole_numbers_stay_numbers(load: Load) -> None:
    trace = load(CLIENTS + "0,13,1,1\n0,2,1,1\n")
    assert trace.clients is not None
    assert trace.clients.tolist() == [13, 2]
    assert trace.client_names == ()


@pytest.mark.parametrize(("first", "second"), [("13", "x"), ("007", "13"), ("-1", "13"), ("é", "13")])
def test_one_client_that_is_no_whole_number_makes_all_of_them_names(load: Load, first: str, second: str) -> None:
    trace = load(CLIENTS + f"0,{first},1,1\n0,{second},1,1\n0,{first},1,1\n")
    assert trace.clients is not None
    assert trace.clients.tolist() == [0, 1, 0]
    assert trace.client_names == (first, second)


def test_an_empty_client_is_an_error(load_error: LoadError) -> None:
    assert load_error(CLIENTS + "0,a,1,1\n0,,1,1\n") == "trace:3: expected a client, found ''"


def test_hash_ids_stand_in_one_cell(load: Load) -> None:
    trace = load(IDS + "0,5,1,7 8,4\n0,5,1,,\n0,8,1,7 9,4\n")
    assert trace.content_block_size == 4
    assert [trace.content_ids(i).tolist() for i in range(3)] == [[7, 8], [], [7, 9]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,4,1,7 8,4", "expected 1 content ids for 4 tokens in blocks of 4, found 2"),
        ("0,5,1,7  8,4", "expected content ids separated by single spaces, found '7  8'"),
        ("0,5,1,7 -8,4", "expected content ids separated by single spaces, found '7 -8'"),
        ("0,5,1,7 x,4", "expected content ids separated by single spaces, found '7 x'"),
        ("0,5,1,7 8,", "expected a hash_block_size, found ''"),
        ("0,5,1,7 8,0", "expected the block size 4 of the lines before, found 0"),
        ("0,5,1,7 8,5", "expected the block size 4 of the lines before, found 5"),
        (f"0,5,1,7 {2**62},4", "expected runs of 1 or more content ids of 0 to 4611686018427387903, found a run of 1"),
        (f"0,5,1,7 {2**70},4", "expected content ids within 64 bits, found 1180591620717411303424"),
        ("0,8,1,5 8,4", "expected prefix ids (each id always after the same ids), found id 8 after different ones"),
    ],
)
def test_hash_ids_that_cannot_be_are_an_error(load_error: LoadError, row: str, message: str) -> None:
    assert load_error(IDS + f"0,8,1,7 8,4\n{row}\n").startswith(f"trace:3: {message}")


def test_a_column_of_priorities_holds_numbers(load: Load, load_error: LoadError) -> None:
    trace = load("priority," + PLAIN + "1,0,5,1\n-2.5,0,5,1\n")
    assert trace.priorities is not None
    assert trace.priorities.tolist() == [1.0, -2.5]
    message = load_error("priority," + PLAIN + "1,0,5,1\n,0,5,1\n")
    assert message == "trace:3: expected a number in column 'priority', found ''"


def test_a_partial_last_block_may_have_an_id_or_none(load: Load) -> None:
    trace = load(IDS + "0,5,1,7,4\n0,5,1,7 8,4\n")
    assert trace.num_content_ids().tolist() == [1, 2]


def test_hash_ids_without_a_block_size_are_an_error(load_error: LoadError) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,hash_ids\n0,5,1,7 8\n"
    assert load_error(text) == "trace:1: expected a column 'hash_block_size' beside 'hash_ids', found none"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("nan", "expected a number in column 'arrival_s', found 'nan'"),
        ("inf", "expected a number in column 'arrival_s', found 'inf'"),
        ("-1", "expected an arrival of 0 to 1e+09 s, found -1.0 s"),
        ("1e30", "expected an arrival of 0 to 1e+09 s, found 1e+30 s"),
        ("1e999", "expected an arrival of 0 to 1e+09 s, found inf s"),
        ("1_0", "expected a number in column 'arrival_s', found '1_0'"),
        (" 1", "expected a number in column 'arrival_s', found ' 1'"),
        ("٣", "expected a number in column 'arrival_s', found '\\u0663'"),
        ("", "expected a number in column 'arrival_s', found ''"),
    ],
)
def test_an_arrival_that_cannot_be_is_an_error(load_error: LoadError, cell: str, message: str) -> None:
    assert load_error(PLAIN + f"{cell},1,1\n") == f"trace:2: {message}"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("0", "expected prompt tokens of 1 to 16777216, found 0"),
        ("-3", "expected prompt tokens of 1 to 16777216, found -3"),
        ("16777217", "expected prompt tokens of 1 to 16777216, found 16777217"),
        ("9223372036854775808", "expected prompt_tokens within 64 bits, found 9223372036854775808"),
        ("1180591620717411303424", "expected prompt_tokens within 64 bits, found 1180591620717411303424"),
        ("1.0", "expected an integer in column 'prompt_tokens', found '1.0'"),
        ("1e3", "expected an integer in column 'prompt_tokens', found '1e3'"),
        ("nan", "expected an integer in column 'prompt_tokens', found 'nan'"),
        ("+1", "expected an integer in column 'prompt_tokens', found '+1'"),
        ("9" * 5000, "expected an integer in column 'prompt_tokens', found '" + "9" * 56 + "..."),
    ],
)
def test_tokens_that_cannot_be_are_an_error(load_error: LoadError, cell: str, message: str) -> None:
    assert load_error(PLAIN + f"0,1,1\n0,{cell},1\n") == f"trace:3: {message}"


def test_arrivals_out_of_order_are_an_error_and_never_sorted(load_error: LoadError) -> None:
    expected = "trace:3: expected arrivals in order (not before 5.0 s), found 4.0 s"
    assert load_error(PLAIN + "5,1,1\n4,1,1\n") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,1", "expected 3 fields, found 2"),
        ("0,1,1,1", "expected 3 fields, found 4"),
        ('0,1,"1', "expected a CSV record on one line, found unexpected end of data"),
        ('0,"1"x,1', "expected a CSV record on one line, found ',' expected after '\"'"),
        ("0,1\r,1", "expected a CSV record on one line, found new-line character seen in unquoted field"),
    ],
)
def test_a_broken_record_is_an_error_on_its_line(load_error: LoadError, row: str, message: str) -> None:
    assert load_error(PLAIN + f"0,1,1\n{row}\n0,1,1\n") == f"trace:3: {message}"


def test_a_column_twice_is_an_error(load_error: LoadError) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,1,2\n"
    assert load_error(text) == "trace:1: expected each column once, found column 'prompt_tokens' twice"
