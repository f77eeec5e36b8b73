"""A recorded run is read back as it was, and its replay takes the very same steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from recorded_engine import COSTS, RecordedEngine, make_requests, make_scheduler, record_run
from rich.console import Console

from pagedkv import CacheConfig, ConfigError, KVCacheManager, TraceError
from pagedkv.engine.run_record import RunRecorder
from pagedkv.scheduler import Cheaper, Recompute, Request, Scheduler, SchedulerConfig, Swap
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.recorded_replay import replay_run
from pagedkv.simulations.run_comparison import compare_run, print_comparison
from pagedkv.simulations.run_records import RunRecord, read_run
from pagedkv.simulations.traces import load_trace

PREEMPTIONS = {"recompute": Recompute(), "swap": Swap(), "cheaper": Cheaper(1.5e-4, 1.9e-4)}


def first_tokens(engine: RecordedEngine, record: RunRecord) -> list[float]:
    """When each request of the trace got its first token in the engine, in the trace's order; NaN where none came."""
    lines = (record.folder / "trace.jsonl").read_text().splitlines()
    return [engine.first_token_s.get((json.loads(line)["request_id"], 0), np.nan) for line in lines]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by_priority", [False, True], ids=["fcfs", "priority"])
@pytest.mark.parametrize("name", sorted(PREEMPTIONS))
def test_the_replay_takes_the_steps_that_were_recorded(tmp_path: Path, name: str, by_priority: bool, seed: int) -> None:
    engine = record_run(tmp_path / "run", seed, num_blocks=30, preemption=PREEMPTIONS[name], by_priority=by_priority)
    record = read_run(tmp_path / "run")

    run = replay_run(record, COSTS, {"checks": True})

    steps = record.steps
    np.testing.assert_array_equal(run.steps.column("start_s"), steps.start_s)
    np.testing.assert_array_equal(run.steps.column("duration_s"), steps.end_s - steps.start_s)
    np.testing.assert_array_equal(run.steps.column("num_tokens"), steps.load.num_tokens)
    np.testing.assert_array_equal(run.steps.column("num_used_blocks"), steps.num_used_blocks)
    got_tokens = record.trace.output_tokens > 0
    np.testing.assert_array_equal(run.requests.first_token_s[got_tokens], record.requests.first_token_s[got_tokens])
    np.testing.assert_array_equal(record.requests.first_token_s, first_tokens(engine, record))
    np.testing.assert_array_equal(run.requests.finished_s, record.requests.end_s)
    assert len(run.preemptions) == int(record.requests.num_preemptions.sum()) > 0
    assert int(record.requests.has_stopped.sum()) > 10
    # The workload has what could go wrong: sharing, unlike samples, swaps where they are allowed.
    assert int(run.requests.num_hit.sum()) > 0
    assert int((record.requests.num_samples > 1).sum()) > 10
    assert (int(np.sum(steps.load.num_swapped_out_blocks)) > 0) == (name != "recompute")
    assert int(np.sum(steps.load.num_copied_blocks)) > 0


def test_a_run_without_samples_is_replayed_in_leaps_to_the_same_times(tmp_path: Path) -> None:
    scheduler = make_scheduler(num_blocks=30)
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        arrivals = [(0.01 * i, Request(str(i), [i, 2, 3, 4, 5], max_new_tokens=20 + i)) for i in range(12)]
        RecordedEngine(scheduler, recorder).serve(arrivals)
    record = read_run(tmp_path / "run")

    run = replay_run(record, COSTS)

    # A leap adds up its steps' times in one go; the recorded clock did the same one by one.
    np.testing.assert_array_equal(run.steps.column("start_s"), record.steps.start_s)
    np.testing.assert_array_equal(run.requests.first_token_s, record.requests.first_token_s)
    np.testing.assert_array_equal(run.requests.finished_s, record.requests.end_s)


def test_a_run_with_shares_of_clients_is_replayed_with_them(tmp_path: Path) -> None:
    config = SchedulerConfig(64, 4, client_share=0.5)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(64, block_size=4)))
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        clients = ["flood"] * 8 + [None, "quiet"]
        arrivals = [
            (0.001 * i, Request(str(i), [i, 2, 3, 4, 5], 20, client=client)) for i, client in enumerate(clients)
        ]
        RecordedEngine(scheduler, recorder).serve(arrivals)
    record = read_run(tmp_path / "run")

    run = replay_run(record, COSTS)

    np.testing.assert_array_equal(run.requests.first_token_s, record.requests.first_token_s)
    assert record.requests.first_token_s[9] < record.requests.first_token_s[2]


def test_a_plain_replay_of_the_trace_file_takes_real_lengths_and_shared_blocks(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        engine = RecordedEngine(scheduler, recorder)
        requests = [
            Request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], 50, stop_token_ids=(7,)),
            Request("b", [1, 2, 3, 4, 9], 2),
        ]
        engine.serve([(0.5, requests[0]), (0.5, requests[1])], {("a", 0): 3})

    trace = load_trace(tmp_path / "run" / "trace.jsonl")

    assert trace.arrival_s.tolist() == [0.5, 0.5]
    assert trace.prompt_tokens.tolist() == [9, 5]
    assert trace.output_tokens.tolist() == [3, 2]
    assert trace.content_block_size == 4
    assert trace.content_ids(0).tolist() == [0, 1]
    assert trace.content_ids(1).tolist() == [0]


def test_no_token_of_a_prompt_or_an_answer_is_in_the_record(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        engine = RecordedEngine(scheduler, recorder)
        engine.next_token = 987_650_000
        engine.serve([(0.0, Request("a", [987_654_321] * 9, 3))])

    text = "".join(path.read_text() for path in (tmp_path / "run").iterdir())

    assert "98765" not in text


def test_an_aborted_request_is_replayed_up_to_the_tokens_that_it_got(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        requests = [Request(name, [1, 2, 3], 30, n=n) for name, n in (("cut", 2), ("stays", 1), ("never", 8))]
        RecordedEngine(scheduler, recorder).serve(
            [(0.0, request) for request in requests], aborts=[(0.02, "cut"), (0.0, "never")]
        )
    record = read_run(tmp_path / "run")

    run = replay_run(record, COSTS)

    # The one that never got a seat cost nothing, so it is no part of the trace.
    assert record.trace.output_tokens.tolist() == [5, 30]
    assert record.requests.is_aborted.tolist() == [True, False]
    assert run.requests.num_output.tolist() == [5, 30]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_never_admitted"] == 1


def test_with_the_recorded_engine_the_comparison_is_exact_and_labelled(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1, num_blocks=30)
    record = read_run(tmp_path / "run")

    figures = compare_run(record, replay_run(record, COSTS))

    for name in ("makespan_s", "num_steps", "computed_tokens", "num_preemptions"):
        assert figures[name]["recorded"] == figures[name]["simulated"] > 0
        assert figures[name]["relative_error"] == 0
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert [pair["relative_error"] for pair in figures[name].values()] == [0, 0, 0, 0]
    shown = io.StringIO()
    print_comparison(figures, {"num_blocks": 5}, Console(file=shown, width=100))
    assert "recorded (measured)" in shown.getvalue()
    assert "simulated with other options than recorded: num_blocks 5" in shown.getvalue()


def test_time_between_steps_counts_only_while_requests_are_there(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        arrivals = [(0.0, Request("a", [1, 2, 3], 3)), (5.0, Request("b", [1, 2, 3], 1))]
        RecordedEngine(scheduler, recorder).serve(arrivals, pause_s=0.25)
    record = read_run(tmp_path / "run")

    figures = compare_run(record, replay_run(record, COSTS))

    assert figures["between_steps_s"]["recorded"] == pytest.approx(0.5, abs=1e-12)
    assert figures["between_steps_s"]["simulated"] == 0.0


def test_requests_that_the_simulation_rejects_are_left_out_of_both_sides(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        arrivals = [
            (0.0, Request("large", range(90), 3)),
            (0.0, Request("a", [1, 2, 3], 3)),
            (5.0, Request("b", [1], 2)),
        ]
        RecordedEngine(scheduler, recorder).serve(arrivals)
    record = read_run(tmp_path / "run")

    figures = compare_run(record, replay_run(record, COSTS, {"num_blocks": 5}))

    assert [figures[name] for name in ("num_compared", "num_aborted", "num_rejected")] == [2, 0, 1]
    # From 0.02 to 5 s nobody is there: the large one was refused when it came.
    assert figures["between_steps_s"]["simulated"] == 0.0
    measured = record.requests.first_token_s[1:] - record.trace.arrival_s[1:]
    assert figures["ttft_s"]["mean"]["recorded"] == pytest.approx(measured.mean())
    shown = io.StringIO()
    print_comparison(figures, {}, Console(file=shown, width=100))
    text = "latencies over the 2 requests that finished in both; left out: 1 rejected in the simulation\n"
    assert text in shown.getvalue()


def test_a_simulation_that_rejects_every_request_is_compared_all_the_same(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1)
    record = read_run(tmp_path / "run")

    figures = compare_run(record, replay_run(record, COSTS, {"num_blocks": 1, "block_size": 1}))

    assert figures["makespan_s"]["simulated"] == 0.0
    assert figures["ttft_s"]["mean"] == {"recorded": None, "simulated": None, "relative_error": None}


def test_options_that_differ_change_the_replay_and_are_told(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1, num_blocks=30)
    record = read_run(tmp_path / "run")

    run = replay_run(record, COSTS, {"num_blocks": 300, "preemption": "swap", "max_num_batched_tokens": 16})

    assert len(run.preemptions) == 0
    assert run.steps.column("num_tokens").max() == 16
    assert run.configuration["changed_options"] == {
        "num_blocks": 300,
        "preemption": "swap",
        "max_num_batched_tokens": 16,
    }
    assert run.configuration["num_blocks"] == 300
    assert run.configuration["preemption"] == "Swap"
    assert summarize(run)["num_finished"] == len(record.trace)


def test_model_and_cost_model_together_are_refused(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1)

    with pytest.raises(ConfigError, match="give one of the two"):
        replay_run(read_run(tmp_path / "run"), COSTS, {"model": "Llama-3-8B"})


@pytest.mark.parametrize("option", [{"kv_bits": 8}, {"weight_bits": 8}, {"num_devices": 2}])
def test_parts_of_a_preset_are_refused_where_step_times_are_fitted(tmp_path: Path, option: dict[str, int]) -> None:
    record_run(tmp_path / "run", 1)
    (name,) = option

    with pytest.raises(ConfigError, match=f"{name} cannot change step times .* give model or device, too"):
        replay_run(read_run(tmp_path / "run"), None, option)


def test_the_configuration_names_the_hardware_that_step_times_are_of(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1)
    record = read_run(tmp_path / "run")
    preset = {"model": "Llama-3-70B", "device": "A100-80G", "num_devices": 2}

    fitted, costed, modelled = (replay_run(record, *args) for args in ((), (COSTS,), (None, preset)))

    assert [fitted.configuration[name] for name in ("model", "device")] == ["toy", "none"]
    assert [costed.configuration[name] for name in ("model", "device")] == [None, None]
    assert {name: modelled.configuration[name] for name in preset} == preset
    assert modelled.configuration["recorded_run"]["model"] == {"name": "toy", "device": "none"}


def test_without_a_cost_model_the_steps_of_the_run_say_how_long_steps_take(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 1, num_blocks=30, preemption=Swap())
    record = read_run(tmp_path / "run")

    run = replay_run(record)

    np.testing.assert_allclose(run.requests.finished_s, record.requests.end_s, rtol=1e-6)
    assert run.configuration["cost_model"]["per_token_s"] == pytest.approx(2e-4, rel=1e-6)


def test_a_run_that_was_cut_off_is_read_up_to_its_last_complete_lines(tmp_path: Path) -> None:
    scheduler = make_scheduler()
    recorder = RunRecorder(tmp_path / "run", scheduler)
    RecordedEngine(scheduler, recorder).serve(make_requests(1)[0][:20])
    recorder._flush()
    for name in ("steps.csv", "trace.jsonl"):
        path = tmp_path / "run" / name
        path.write_bytes(path.read_bytes()[:-3])

    record = read_run(tmp_path / "run")

    assert not record.header.is_complete
    assert len(record.trace) == len(record.requests.end_s) == 19
    assert len(record.steps) == len((tmp_path / "run" / "steps.csv").read_text().splitlines()) - 2
    assert len(replay_run(record, COSTS).steps) > 0
    recorder.close()


DAMAGED = {
    "no header": ("run.json", None, "expected the folder of a recorded run, found no run.json"),
    "not json": ("run.json", lambda text: text[:50], "run.json: expected JSON, found something else"),
    "version": ("run.json", lambda text: text.replace('"pagedkv_run": 1', '"pagedkv_run": 9'), "version 1, found 9"),
    "policy": ("run.json", lambda text: text.replace('"FCFS"', '"Lifo"'), "configuration of an engine, found"),
    "role": ("run.json", lambda text: text.replace('"FCFS"', '"Swap"'), "configuration of an engine, found"),
    "num_blocks": (
        "run.json",
        lambda text: text.replace('"num_blocks": 1000', '"num_blocks": -1'),
        "found 'num_blocks",
    ),
    "no steps": ("steps.csv", lambda text: text.splitlines()[0] + "\n", "expected at least one step, found none"),
    "step column": (
        "steps.csv",
        lambda text: text.replace("num_rows", "rows"),
        "steps.csv:1: expected a column 'num_rows'",
    ),
    "step fields": ("steps.csv", lambda text: text + "1,2\n", "expected 12 fields, found 2"),
    "step time": ("steps.csv", lambda text: text + "9,8" + ",1" * 10 + "\n", "ends later, found 9.0 to 8.0 s"),
    "step rows": (
        "steps.csv",
        lambda text: text + "8,9,0" + ",1" * 9 + "\n",
        "expected num_rows of at least 1, found 0",
    ),
    "step number": (
        "steps.csv",
        lambda text: text + "8,9,x" + ",1" * 9 + "\n",
        "integer in column 'num_rows', found 'x'",
    ),
    "half a line": ("trace.jsonl", lambda text: text[:-30], "trace.jsonl:60: expected"),
    "no samples": (
        "trace.jsonl",
        lambda text: _first_line(text, samples=[]),
        "trace.jsonl:1: expected 1 to 1024 samples",
    ),
    "length": (
        "trace.jsonl",
        lambda text: _first_line(text, output_tokens=99),
        "trace.jsonl:1: expected output_tokens",
    ),
    "priority": (
        "trace.jsonl",
        lambda text: _first_line(text, priority="x"),
        "trace.jsonl:1: expected `float` at `$.priority`",
    ),
    "order": (
        "trace.jsonl",
        lambda text: _first_line(text, arrival_s=1e6),
        "trace.jsonl:2: expected arrivals in order",
    ),
}


def _first_line(text: str, **fields: object) -> str:
    first, rest = text.split("\n", 1)
    return json.dumps({**json.loads(first), **fields}) + "\n" + rest


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_record_is_one_typed_line_with_the_place(tmp_path: Path, name: str) -> None:
    record_run(tmp_path / "run", 1)
    file, damage, message = DAMAGED[name]
    path = tmp_path / "run" / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))

    with pytest.raises(TraceError) as caught:
        read_run(tmp_path / "run")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"end_s": -1.0}, "arrival, first token and end in order"),
        ({"first_token_s": None}, "first_token_s exactly where tokens came"),
        ({"num_preemptions": -1}, "tokens and preemptions of 0 to 16777216"),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    scheduler = make_scheduler()
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        RecordedEngine(scheduler, recorder).serve([(0.0, Request("a", [1, 2], 3))])
    path = tmp_path / "run" / "trace.jsonl"
    line = json.loads(path.read_text())
    line["samples"][0] |= fields
    path.write_text(json.dumps(line) + "\n")

    with pytest.raises(TraceError, match=f"trace.jsonl:1: expected {message}"):
        read_run(tmp_path / "run")
