"""What the recorder writes, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager, UnknownIdError
from pagedkv.engine.run_record import STEP_COLUMNS, RunRecorder
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig


@pytest.fixture
def scheduler() -> Scheduler:
    """Blocks of 2 tokens, 8 tokens a step."""
    return Scheduler(
        SchedulerConfig(max_num_batched_tokens=8, max_num_running=4), KVCacheManager(CacheConfig(64, block_size=2))
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finish(recorder: RunRecorder, request_id: str, sample_idx: int = 0, **fields: Any) -> None:
    given = {"reason": "length", "first_token_s": 1.5, "end_s": 2.0, "num_output_tokens": 3} | fields
    recorder.on_finish(request_id, sample_idx, given.pop("reason"), **given)


def test_a_step_is_one_line_with_its_load(scheduler: Scheduler, tmp_path: Path) -> None:
    with RunRecorder(tmp_path / "run", scheduler, origin_s=100.0) as recorder:
        for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6, 7, 8, 9])):
            request = Request(name, prompt, 4)
            scheduler.add(request, 100.0)
            recorder.on_request(request, 100.0)
        for start in (100.0, 100.5):
            plan = scheduler.schedule(start)
            scheduler.update(plan, [50] * len(plan.sampling_rows), start + 0.25)
            recorder.on_step(plan, start, start + 0.25, num_waiting=0, num_used_blocks=5)

    header, first, second = (tmp_path / "run" / "steps.csv").read_text().splitlines()
    assert header == ",".join(STEP_COLUMNS)
    # 3 tokens see 1 + 2 + 3 keys, the first 5 of the other prompt 1 + ... + 5; then its 6th, and a decode at length 4.
    assert first == "0.0,0.25,2,8,1,8,21,0,0,0,0,5"
    assert second == "0.5,0.75,2,2,2,10,10,0,0,0,0,5"


def test_requests_are_written_in_order_of_arrival_once_all_before_them_have_ended(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    recorder = RunRecorder(tmp_path / "run", scheduler, origin_s=1.0)
    for now, name in ((1.0, "first"), (1.25, "second"), (1.25, "third")):
        recorder.on_request(Request(name, [1, 2, 3, 4, 5], 9), now)
    finish(recorder, "second")
    recorder._flush()

    assert (tmp_path / "run" / "trace.jsonl").read_text() == ""

    finish(recorder, "first", first_token_s=None, num_output_tokens=0, reason="abort")
    recorder._flush()

    # The first was aborted before it had a seat, so the run did nothing for it.
    [line] = lines_of(tmp_path / "run" / "trace.jsonl")
    assert line == {
        "arrival_s": 0.25,
        "prompt_tokens": 5,
        "output_tokens": 3,
        "hash_block_size": 2,
        "hash_runs": [[0, 2]],
        "client": 0,
        "request_id": "second",
        "max_new_tokens": 9,
        "priority": 0.0,
        "reads_cache": True,
        "samples": [
            {"reason": "length", "first_token_s": 0.5, "end_s": 1.0, "num_output_tokens": 3, "num_preemptions": 0}
        ],
    }
    recorder.close()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["is_complete"], state["num_requests"]) == (True, 1)
    assert (state["num_never_admitted"], state["num_unfinished"]) == (1, 1)


def test_equal_numbers_mean_equal_prefixes_under_equal_salt(scheduler: Scheduler, tmp_path: Path) -> None:
    prompts = {
        "a": Request("a", [1, 2, 3, 4, 5], 1),
        "same": Request("same", [1, 2, 3, 4], 1),
        "parts at the second block": Request("parts at the second block", [1, 2, 3, 9], 1),
        "same tail, other head": Request("same tail, other head", [9, 9, 3, 4], 1),
        "other salt": Request("other salt", [1, 2, 3, 4], 1, salt=b"x"),
        "short": Request("short", [1], 1),
    }
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        for name, request in prompts.items():
            recorder.on_request(request, 1.0)
            finish(recorder, name)

    runs = {line["request_id"]: line.get("hash_runs") for line in lines_of(tmp_path / "run" / "trace.jsonl")}
    assert runs == {
        "a": [[0, 2]],
        "same": [[0, 2]],
        "parts at the second block": [[0, 1], [2, 1]],
        "same tail, other head": [[3, 2]],
        "other salt": [[5, 2]],
        "short": None,
    }


def test_samples_end_one_by_one_and_a_prompt_without_output_ends_once(scheduler: Scheduler, tmp_path: Path) -> None:
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        recorder.on_request(Request("two", [1], 9, n=2), 0.0)
        recorder.on_request(Request("none", [1], 0, n=3), 0.0)
        finish(recorder, "two", 1, num_output_tokens=7)
        finish(recorder, "none", first_token_s=None, num_output_tokens=0)
        finish(recorder, "two", 0)

    two, none = lines_of(tmp_path / "run" / "trace.jsonl")
    assert [sample["num_output_tokens"] for sample in two["samples"]] == [3, 7]
    assert two["output_tokens"] == 7
    assert [sample["num_output_tokens"] for sample in none["samples"]] == [0, 0, 0]


def test_lines_reach_the_file_within_a_second_of_the_run(scheduler: Scheduler, tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path / "run", scheduler)
    request = Request("a", [1], 9)
    scheduler.add(request, 0.0)
    num_lines = []
    for start in (0.0, 0.4, 0.8, 1.2):
        plan = scheduler.schedule(start)
        scheduler.update(plan, [5], start + 0.3)
        recorder.on_step(plan, start, start + 0.3, num_waiting=0, num_used_blocks=1)
        num_lines.append(len((tmp_path / "run" / "steps.csv").read_text().splitlines()))

    assert num_lines == [1, 1, 4, 4]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_complete"] is False
    recorder.close()


def test_a_plan_without_rows_is_no_step(scheduler: Scheduler, tmp_path: Path) -> None:
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        recorder.on_step(scheduler.schedule(0.0), 0.0, 1.0, num_waiting=0, num_used_blocks=0)

    assert len((tmp_path / "run" / "steps.csv").read_text().splitlines()) == 1


def _go_back(recorder: RunRecorder) -> None:
    recorder.on_request(Request("b", [1], 1), 1.0)
    recorder.on_request(Request("c", [1], 1), 0.5)


REFUSED: dict[str, tuple[Callable[[RunRecorder], None], str]] = {
    "arrival before the one before": (_go_back, "arrivals must be in order, not before 1.0 s of the run, found 0.5"),
    "nan arrival": (lambda recorder: recorder.on_request(Request("b", [1], 1), math.nan), "found nan"),
    "live twice": (lambda recorder: recorder.on_request(Request("a", [1], 1), 0.0), "request 'a' is live already"),
    "unknown request": (lambda recorder: finish(recorder, "x"), "no live sample 0 of request 'x'"),
    "unknown sample": (lambda recorder: finish(recorder, "a", 1), "no live sample 1 of request 'a'"),
    "end without a time": (lambda recorder: finish(recorder, "a", end_s=math.inf), "found 1.5 and inf"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_mistake_is_refused_and_the_record_goes_on(scheduler: Scheduler, tmp_path: Path, name: str) -> None:
    call, message = REFUSED[name]
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        recorder.on_request(Request("a", [1], 9), 0.0)
        with pytest.raises((InvalidArgumentError, UnknownIdError)) as caught:
            call(recorder)
        finish(recorder, "a")

    assert message in str(caught.value)
    assert lines_of(tmp_path / "run" / "trace.jsonl")[0]["request_id"] == "a"


def test_a_step_that_a_coarse_clock_gives_no_time_takes_a_microsecond(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.add(Request("a", [1], 9), 0.0)
    plan = scheduler.schedule(0.0)
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        recorder.on_step(plan, 1.0, 1.0, num_waiting=0, num_used_blocks=1)

    assert (tmp_path / "run" / "steps.csv").read_text().splitlines()[1].startswith("1.0,1.000001,")


def test_a_step_that_ends_before_it_begins_is_refused(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.add(Request("a", [1], 9), 0.0)
    plan = scheduler.schedule(0.0)
    with RunRecorder(tmp_path / "run", scheduler) as recorder:
        for start, end in ((1.0, 0.5), (-1.0, 1.0), (1.0, math.nan)):
            with pytest.raises(InvalidArgumentError, match="must begin in the run and not end before"):
                recorder.on_step(plan, start, end, num_waiting=0, num_used_blocks=1)


def test_a_folder_that_holds_a_run_is_left_alone(scheduler: Scheduler, tmp_path: Path) -> None:
    RunRecorder(tmp_path, scheduler).close()
    before = (tmp_path / "run.json").read_text()

    with pytest.raises(InvalidArgumentError, match="holds a recorded run already"):
        RunRecorder(tmp_path, scheduler)

    assert (tmp_path / "run.json").read_text() == before


def test_a_policy_that_a_record_cannot_name_is_refused(tmp_path: Path) -> None:
    class Mine:
        def rank(self, request: Request, now: float) -> float:
            return 0.0

    scheduler = Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(4)), policy=Mine())

    with pytest.raises(InvalidArgumentError, match="can only name pagedkv's own policies"):
        RunRecorder(tmp_path / "run", scheduler)

    assert not (tmp_path / "run").exists()
