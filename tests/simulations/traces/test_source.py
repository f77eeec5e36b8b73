from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import pytest

from pagedkv.errors import TraceError
from pagedkv.simulations.traces import limits, load_trace

from .conftest import Load, LoadError

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
ONE = HEADER + "0,1,1\n"


def test_gzip_is_told_by_its_first_bytes_and_not_by_the_name(load: Load) -> None:
    plain, packed = load(ONE), load(gzip.compress(ONE.encode()))
    assert packed.has_same_requests(plain)
    assert packed.digest == plain.digest


def test_a_gzip_file_of_several_members_is_one_text(load: Load) -> None:
    assert len(load(gzip.compress(ONE.encode()) + gzip.compress(b"1,1,1\n"))) == 2


def test_the_digest_is_that_of_the_decompressed_bytes(load: Load) -> None:
    # printf 'arrival_s,prompt_tokens,output_tokens\n0,1,1\n' | sha256sum
    assert load(ONE).digest == "f722a776211f73736d60f8815bce28276ce3516248d97b30cef78e6bac38f642"


@pytest.mark.parametrize(
    "text",
    [
        ONE.replace("\n", "\r\n"),
        "\ufeff" + ONE,
        ONE.rstrip("\n"),
        ONE + "\n",
        ONE + "\r\n  \n\n",
    ],
    ids=["CRLF", "byte order mark", "no last line end", "trailing blank line", "several of them"],
)
def test_what_costs_no_information_is_accepted(load: Load, text: str) -> None:
    assert load(text).has_same_requests(load(ONE))


@pytest.mark.parametrize("text", ["", "\n", "\r\n\n", "\ufeff"])
def test_an_empty_file_is_an_error(load_error: LoadError, text: str) -> None:
    assert load_error(text) == "trace:1: expected a header or a record, found an empty file"


def test_a_header_alone_is_an_error(load_error: LoadError) -> None:
    assert load_error(HEADER) == "trace: expected at least one request, found none"


def test_a_blank_line_between_records_is_an_error(load_error: LoadError) -> None:
    message = "trace:3: expected a record (blank lines may only end the file), found a blank line"
    assert load_error(ONE + "\n1,1,1\n") == message
    assert load_error(ONE + " \t\n\n1,1,1\n") == message


def test_a_blank_line_at_the_end_of_one_chunk_counts_when_the_next_goes_on(
    load_error: LoadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedkv.simulations.traces.source._CHUNK_BYTES", len(ONE) + 1)
    assert load_error(ONE + "\n1,1,1\n").startswith("trace:3: expected a record (blank lines")


def test_line_numbers_count_on_over_chunks(load_error: LoadError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.simulations.traces.source._CHUNK_BYTES", 7)
    assert load_error(ONE + "0,1,1\n" * 20 + "0,x,1\n").startswith("trace:23: expected an integer")
    assert load_error(ONE + "0,1,1\n" * 20 + "0,0,1\n").startswith("trace:23: expected prompt tokens")


def test_bytes_that_are_not_utf8_are_an_error_on_their_line(load_error: LoadError) -> None:
    assert load_error(ONE.encode() + b"0,1,\xb5\n") == "trace:3: expected UTF-8 text, plain or gzip, found byte 0xb5"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="none: expected a readable file, found no such file"):
        load_trace(tmp_path / "none")


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected a readable file, found a directory"):
        load_trace(tmp_path)


def test_a_line_break_in_the_path_does_not_break_the_message(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        load_trace(tmp_path / "a\nb")
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_stream_is_an_error(load_error: LoadError) -> None:
    packed = gzip.compress(ONE.encode())
    for size in range(2, len(packed)):
        assert "expected a complete gzip stream" in load_error(packed[:size])


def test_gzip_of_garbage_is_an_error(load_error: LoadError) -> None:
    assert "gzip" in load_error(b"\x1f\x8bgarbage and more garbage")
    assert load_error(gzip.compress(b"\x00\xff\xfe")) == "trace:1: expected UTF-8 text, plain or gzip, found byte 0xff"


def test_a_wrong_checksum_is_an_error(load_error: LoadError) -> None:
    packed = bytearray(gzip.compress(ONE.encode()))
    packed[-6] ^= 1
    assert "expected gzip data, found 'CRC check failed" in load_error(bytes(packed))


def test_garbage_after_the_gzip_stream_is_an_error(load_error: LoadError) -> None:
    assert "expected gzip data" in load_error(gzip.compress(ONE.encode()) + b"garbage")


def test_a_bomb_stops_at_the_bound(load_error: LoadError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DECOMPRESSED_BYTES", 2**21)
    packed = gzip.compress((ONE + "0,1,1\n" * 2**19).encode())
    assert len(packed) < 2**15
    assert load_error(packed) == "trace: expected at most 2097152 decompressed bytes, found more"


def test_a_line_without_end_stops_at_the_bound(load_error: LoadError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 2**20)
    compressor = zlib.compressobj(wbits=31)
    packed = io.BytesIO()
    packed.write(compressor.compress(ONE.encode() + b"0" * 2**22))
    packed.write(compressor.flush())
    assert load_error(packed.getvalue()) == "trace:3: expected a line of at most 1048576 bytes, found a longer one"


def test_one_request_too_many_is_an_error_on_its_line(load_error: LoadError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_REQUESTS", 2)
    assert load_error(ONE + "0,1,1\n0,1,1\n") == "trace:4: expected at most 2 requests, found one more"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.gz", "a"])
def test_the_name_is_that_of_the_file_without_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(ONE)
    assert load_trace(tmp_path / name).name == "a"
