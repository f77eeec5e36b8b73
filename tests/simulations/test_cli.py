"""The command as a user meets it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import run_apart
from command_line import run_here as run

from pagedkv.simulations import cache_command
from pagedkv.simulations.cache_pass import CachePass
from pagedkv.simulations.offline_optimum import offline_optimum

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
GOOD = HEADER + "0.0,10,2\n0.5,20,3\n"


def test_without_a_trace_the_sample_is_replayed_and_reports_are_written(tmp_path: Path) -> None:
    result = run_apart("replay", cwd=tmp_path)

    assert result.returncode == 0
    assert result.stderr == ""
    assert "requests finished       400" in result.stdout
    assert "\nKV memory  28,693 blocks of 16 tokens (56.0 GiB)\n" in result.stdout
    names = {path.name for path in (tmp_path / "pagedkv-report").iterdir()}
    assert names == {"summary.json", "requests.csv", "report.html", "trace.perfetto.json"}
    assert "pagedkv-report/report.html" in result.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_replay_that_served_nobody_fails(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "t.csv").write_text(GOOD)

    result = run("replay", "t.csv", "--num-blocks", "1", "--block-size", "2", *options, cwd=tmp_path)

    assert (result.returncode, result.stderr) == (1, "nothing was served: all 2 requests were rejected\n")
    assert "2 of 2 requests rejected" in result.stdout or json.loads(result.stdout)["num_rejected"] == 2


def test_json_is_for_machines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)

    result = run("replay", "t.csv", "--json", cwd=tmp_path)

    shown = json.loads(result.stdout)
    assert shown["num_finished"] == 2
    assert shown["trace"]["name"] == "t"
    assert shown["configuration"]["model"] == "Llama-3-8B"
    assert shown["configuration"]["session_gap_s"] is None
    assert shown == json.loads((tmp_path / "pagedkv-report" / "summary.json").read_text())


def test_the_gap_between_sessions_is_part_of_the_configuration(tmp_path: Path) -> None:
    sessions = [
        {"id": name, "block_size": 4, "requests": [{"t": 0, "in": 3, "out": 2, "runs": []}]} for name in ("a", "b")
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(session) + "\n" for session in sessions))

    shown = [run("replay", "s.jsonl", "--session-gap", gap, "--json", cwd=tmp_path).stdout for gap in ("0", "30")]

    assert [json.loads(text)["configuration"]["session_gap_s"] for text in shown] == [0.0, 30.0]
    assert "<span>session_gap_s</span> 30.0" in (tmp_path / "pagedkv-report" / "report.html").read_text()


def test_help_names_every_option_and_version_is_shown(tmp_path: Path) -> None:
    shown = run("replay", "--help", cwd=tmp_path).stdout

    for option in ("--model", "--device", "--num-blocks", "--preemption", "--eviction", "--out", "--events", "--json"):
        assert option in shown
    assert run("--version", cwd=tmp_path).stdout.startswith("pagedkv 0.")
    assert "traces" in run("--help", cwd=tmp_path).stdout


MALFORMED = {
    "empty": b"",
    "header only": HEADER.encode(),
    "nan": (HEADER + "nan,10,2\n").encode(),
    "negative": (HEADER + "0.0,-10,2\n").encode(),
    "1e30": (HEADER + "0.0,1e30,2\n").encode(),
    "2^70": (HEADER + f"0.0,{2**70},2\n").encode(),
    "missing column": b"arrival_s,prompt_tokens\n0.0,10\n",
    "wrong type": (HEADER + "0.0,ten,2\n").encode(),
    "too few fields": (HEADER + "0.0,10\n").encode(),
    "unsorted": (HEADER + "1.0,10,2\n0.5,10,2\n").encode(),
    "deep json": b'{"arrival_s":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "truncated gzip": gzip.compress(GOOD.encode() * 50)[:60],
    "not utf-8": b"\xff\xfe\x00bad\n",
    "binary": bytes(range(256)) * 8,
    "inner blank line": (HEADER + "0.0,10,2\n\n0.5,20,3\n").encode(),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_a_malformed_trace_is_one_clear_line_and_exit_code_2(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad").write_bytes(MALFORMED[name])

    result = run("replay", "bad", cwd=tmp_path)

    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: bad")
    assert "expected" in result.stderr
    assert "found" in result.stderr
    assert len(result.stderr) < 500
    assert not (tmp_path / "pagedkv-report").exists()


@pytest.mark.parametrize(
    "text", [GOOD, GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD], ids=["plain", "crlf", "byte order mark"]
)
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())

    result = run("replay", "t.csv", "--json", cwd=tmp_path)

    assert json.loads(result.stdout)["prompt_tokens"] == 30


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay", "absent.csv"),
        ("replay", "--model", "GPT-9"),
        ("replay", "--num-blocks", "0"),
        ("replay", "--watermark", "nan"),
        ("replay", "--limit", "0"),
        ("replay", "--rate-scale", "-1"),
        ("replay", "--rate-scale", "1e-300"),
        ("replay", "--block-size", "0"),
        ("replay", "--block-size", "-4", "--num-blocks", "8"),
        ("replay", "--policy", "lifo"),
        ("replay", "--model", "Llama-3-70B", "--device", "RTX-4090"),
        ("replay", "--out", "file"),
        ("replay", "--events", "absent/events.jsonl"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("in the way")

    result = run(*arguments, cwd=tmp_path)

    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("replay --limit 0", "Invalid value for '--limit': "),
        ("replay --num-blocks abc", "Invalid value for '--num-blocks': "),
        ("replay --nope", "No such option: --nope"),
        ("cache", "Missing argument 'TRACE'."),
        ("cache t.csv --capacity -1", "Invalid value for '--capacity': "),
        ("replay --cost-model nofile", "nofile: expected a readable file, found no such file\n"),
        (
            "replay t.csv --policy priority",
            "--policy priority: does nothing without requests of different priority: the trace has none\n",
        ),
        (
            "replay t.csv --num-host-blocks 7",
            "--num-host-blocks: does nothing without --preemption swap or cheaper: give that, too\n",
        ),
        (
            "replay t.csv --eviction sieve --no-prefix-caching",
            "--eviction: does nothing without --prefix-caching: give that, too\n",
        ),
        (
            "replay --events no/x",
            "--events: expected a file that can be written, found no/x: no such file or directory\n",
        ),
        ("traces generate o.jsonl --prompt-median 0", "--prompt-median: expected 1 to 16777216 tokens, found 0.0\n"),
        ("traces generate o.jsonl --output-max 0", "--output-max: expected 1 to 16777216 tokens, found 0\n"),
        (
            "traces generate o.jsonl --num-prefixes 1 --prefix-tokens 0",
            "--prefix-tokens: expected 1 to 16777215, found 0\n",
        ),
        ("traces generate o.jsonl --num-requests 0", "--num-requests: expected 1 to 10000000, found 0\n"),
        ("traces convert t.csv no/o.jsonl", "no/o.jsonl: no such file or directory\n"),
    ],
)
def test_a_mistake_is_told_by_the_option_or_file_that_the_user_gave(
    tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "t.csv").write_text(GOOD)

    result = run(*arguments.split(), cwd=tmp_path)

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_without_a_command_help_is_shown(tmp_path: Path) -> None:
    result = run(cwd=tmp_path)

    assert (result.returncode, result.stderr) == (2, "")
    assert "Usage: " in result.stdout


def test_the_cache_command_prints_policies_beside_the_optimum_and_the_ceiling(tmp_path: Path) -> None:
    requests = [(8, [1, 2]), (8, [3, 4]), (8, [1, 2]), (12, [1, 2, 5])]
    rows = [
        json.dumps({"arrival_s": 0, "prompt_tokens": tokens, "output_tokens": 1, "hash_block_size": 4, "hash_ids": ids})
        for tokens, ids in requests
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")

    result = run("cache", "t.jsonl", "--capacity", "2", "--capacity", "9", "--json", cwd=tmp_path)

    shown = json.loads(result.stdout)
    assert shown["capacities"] == [2, 9]
    assert shown["hit_ratios"]["lru"] == [2 / 9, 4 / 9]
    assert shown["hit_ratios"]["MIN"] == [4 / 9, 4 / 9]
    assert shown["infinite"] == 4 / 9
    assert "infinite cache: 0.4444 (5 distinct blocks of 4 tokens)" in run("cache", "t.jsonl", cwd=tmp_path).stdout


def test_the_cache_command_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[object] = []

    @contextmanager
    def bar(doing: str, total: float) -> Iterator[Callable[[float], None]]:
        shown.append((doing, total))
        yield shown.append

    row = {"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 1, "hash_block_size": 4, "hash_ids": [1, 2]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(cache_command, "progress_bar", bar)

    cache_command.cache(tmp_path / "t.jsonl", capacity=[1, 2], as_json=True)

    names = ("lru", "fifo", "s3-fifo", "sieve", "MIN")
    assert shown == [part for name in names for part in ((f"passing over the trace, {name}", 2), 1, 2)]
    assert json.loads(capsys.readouterr().out)["infinite"] == 0


def test_the_cache_command_tells_what_lies_ahead_and_prints_rows_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 1, "hash_block_size": 4, "hash_ids": [1, 2]}
    (tmp_path / "t.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    printed: list[str] = []

    def optimum(ids: object, capacity: int) -> CachePass:
        printed.append(capsys.readouterr().out)
        return offline_optimum(ids, capacity)

    monkeypatch.setattr(cache_command, "offline_optimum", optimum)

    cache_command.cache(tmp_path / "t.jsonl", capacity=[1], limit=2)

    assert "sieve    0.2500\n" in printed[0]
    assert capsys.readouterr().out.startswith("MIN      0.2500\n")


def test_the_cache_command_says_beforehand_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 1, "hash_block_size": 4, "hash_ids": [1, 2]}
    (tmp_path / "t.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    monkeypatch.setattr(cache_command, "LOOKUP_S", 3.0)

    cache_command.cache(tmp_path / "t.jsonl", capacity=[1, 2], limit=2)

    assert capsys.readouterr().err == "4 blocks to look up, in each of 10 passes: roughly 2 min\n"


def test_the_cache_command_needs_named_blocks(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)

    result = run("cache", "t.csv", cwd=tmp_path)

    assert (result.returncode, result.stderr) == (
        2,
        "error: t.csv: expected a trace that names shared blocks, found none named\n",
    )


def test_an_interrupt_during_the_imports_is_silent(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pagedkv.__main__ as command; command.main()"

    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_without_its_extra_the_command_names_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise ModuleNotFoundError('no msgspec', name='msgspec')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pagedkv.__main__ as command; command.main()"

    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (
        2,
        "error: the pagedkv command needs msgspec: in a checkout of pagedkv, pip install '.[sim]'\n",
    )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "expected a folder, found a file in the way of file"),
        ("file/below", "expected a folder, found a file in the way of file/below"),
        ("/proc/x", "expected a folder that can be made, found /proc/x: no such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_written_is_noticed_before_the_replay(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    code = (
        "import sys, pagedkv.simulations.replay as module\n"
        "module.replay = None\n"  # A replay would be a traceback.
        f"sys.argv = ['pagedkv', 'replay', '--out', {out!r}]\n"
        "from pagedkv.simulations.cli import main\n"
        "main()\n"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: --out: {message}\n")
