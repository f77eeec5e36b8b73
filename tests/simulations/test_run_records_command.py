"""`pagedkv fit`, and `pagedkv replay` of what a real engine recorded, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run_here as run
from recorded_engine import record_run

from pagedkv.scheduler import Swap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a recorded run, `monday`, with swaps."""
    path = tmp_path_factory.mktemp("runs")
    record_run(path / "monday", 1, num_blocks=30, preemption=Swap())
    run("fit", "monday", "--out", "m.json", cwd=path)
    return path


def test_a_fit_is_printed_and_its_file_is_taken_by_a_replay(folder: Path) -> None:
    shown = run("fit", "monday", cwd=folder)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert "steps, measured  name toy, device none" in shown.stdout
    assert "per_token_s" in shown.stdout
    assert "200 µs" in shown.stdout
    assert "R² 1.0000" in shown.stdout
    assert "wrote monday/cost_model.json" in shown.stdout

    replayed = run("replay", "monday", "--cost-model", "monday/cost_model.json", "--json", cwd=folder)

    summary = json.loads(replayed.stdout)
    assert summary["comparison"]["ttft_s"]["p99"]["relative_error"] == pytest.approx(0, abs=1e-6)
    assert json.loads((folder / "pagedkv-report" / "summary.json").read_text())["comparison"] == summary["comparison"]


def test_a_fit_as_json_names_its_file(folder: Path) -> None:
    shown = json.loads(run("fit", "monday", "--out", "other.json", "--json", cwd=folder).stdout)

    assert shown["file"] == "other.json"
    assert shown["constants"]["per_token_s"] == pytest.approx(2e-4)
    assert shown["unidentified"] == {}
    assert (folder / "other.json").exists()


def test_a_recorded_run_is_replayed_as_it_was_configured_and_compared(folder: Path) -> None:
    shown = run("replay", "monday", cwd=folder)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert "recorded (measured)" in shown.stdout
    assert "other options" not in shown.stdout
    summary = json.loads((folder / "pagedkv-report" / "summary.json").read_text())
    assert summary["configuration"]["num_blocks"] == 30
    assert summary["configuration"]["max_num_batched_tokens"] == 32
    assert summary["comparison"]["num_preemptions"]["recorded"] == summary["num_preemptions"] > 0


def test_options_on_the_command_line_change_the_replay_of_a_recorded_run(folder: Path) -> None:
    options = (
        "--num-blocks",
        "300",
        "--watermark",
        "0.01",
        "--max-preemptions",
        "2",
        "--client-share",
        "0.9",
        "--check",
    )
    shown = run("replay", "monday", *options, cwd=folder)

    # The default of an ordinary replay counts as a change, too, if the run was recorded with something else.
    changed = "client_share 0.9, max_preemptions 2, num_blocks 300, watermark 0.01"
    assert f"simulated with other options than recorded: {changed}\n" in shown.stdout
    configuration = json.loads((folder / "pagedkv-report" / "summary.json").read_text())["configuration"]
    assert (configuration["client_share"], configuration["max_preemptions"]) == (0.9, 2)


def test_a_recorded_run_has_priorities_and_host_blocks_to_change(folder: Path) -> None:
    options = ("--policy", "priority", "--num-host-blocks", "50", "--eviction", "fifo")

    recorded = run("replay", "monday", *options, cwd=folder)
    trace = run("replay", "monday/trace.jsonl", "--policy", "priority", cwd=folder)

    assert (recorded.returncode, recorded.stderr) == (trace.returncode, trace.stderr) == (0, "")


def test_a_cost_model_serves_any_trace(folder: Path) -> None:
    summary = run("replay", "--cost-model", "m.json", "--limit", "20", "--json", cwd=folder)
    plain = run("replay", "monday/trace.jsonl", "--cost-model", "m.json", "--json", cwd=folder)

    assert json.loads(summary.stdout)["num_finished"] == 20
    assert json.loads(plain.stdout)["num_finished"] == 60
    assert "comparison" not in json.loads(plain.stdout)
    configuration = json.loads((folder / "pagedkv-report" / "summary.json").read_text())["configuration"]
    assert configuration["cost_model"]["kind"] == "linear"
    assert configuration["model"] == "Llama-3-8B"  # It says how many blocks there are.


def test_with_a_cost_model_and_a_number_of_blocks_no_hardware_is_named(folder: Path) -> None:
    arguments = ("--cost-model", "m.json", "--num-blocks", "900", "--limit", "2", "--json", "--out", "blocks")

    configuration = json.loads(run("replay", *arguments, cwd=folder).stdout)["configuration"]

    names = ("model", "device", "num_devices", "weight_bits", "kv_bits")
    assert [configuration[name] for name in names] == [None] * 5
    page = (folder / "blocks" / "report.html").read_text()
    assert "<li><span>cost_model</span> linear</li><li><span>block_size</span> 16</li>" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "absent"), "absent: expected the folder of a recorded run, found no run.json"),
        (("fit", "monday/trace.jsonl"), "trace.jsonl: expected the folder of a recorded run, found no run.json"),
        (("replay", "."), "found no run.json"),
        (("fit", "monday", "--out", "absent/m.json"), "error: absent/m.json: no such file or directory"),
        (("fit", "monday", "--out", "."), "error: .: "),
        (("replay", "--cost-model", "absent.json"), "absent.json: expected a readable file, found no such file"),
        (("replay", "--cost-model", "monday/run.json"), "expected a linear cost model of version 1"),
        (("replay", "monday", "--limit", "3"), "replayed whole: for a part, replay monday/trace.jsonl"),
        (("replay", "monday", "--session-gap", "3"), "replayed whole"),
        (("replay", "monday", "--policy", "lifo"), "policy must be one of"),
        (("replay", "monday", "--block-size", "3"), "choose a divisor or a multiple of 4"),
        (("replay", "monday", "--cost-model", "m.json", "--device", "H100"), "give one of the two"),
        (
            ("replay", "monday", "--preemption", "recompute", "--num-host-blocks", "8"),
            "does nothing without --preemption",
        ),
        (("replay", "monday", "--no-prefix-caching", "--eviction", "fifo"), "does nothing without --prefix-caching"),
        (("replay", "monday", "--kv-bits", "8"), "kv_bits cannot change step times that are fitted to the run"),
        (
            ("replay", "--cost-model", "m.json", "--num-blocks", "9", "--weight-bits", "4"),
            "--weight-bits: --cost-model and --num-blocks say all that it would: give one of the two",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, cwd=folder)

    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
