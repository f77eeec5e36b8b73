"""A recording makes every decision again, and one that was tampered with is refused by line."""

from __future__ import annotations

import io
import json

import pytest

from pagedkv import CacheConfig, ExtraKey, KVCacheManager, SimulatedPrompt
from pagedkv.eviction import make_policy
from pagedkv.scheduler import (
    FCFS,
    Cheaper,
    EventLog,
    LowestPriority,
    Priority,
    Recorder,
    RecordingError,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    replay_recording,
)


def record() -> tuple[list[str], str]:
    """A small service: preemption, a refusal, an abort, a failed step. Returns the recording and the event log."""
    log, recording = io.StringIO(), io.StringIO()
    manager = KVCacheManager(CacheConfig(6, 4, 6), eviction=make_policy("sieve", 6))
    scheduler = Recorder(
        Scheduler(
            SchedulerConfig(32, 4, watermark=0),
            manager,
            policy=Priority(0.5),
            victim=LowestPriority(),
            preemption=Cheaper(1.0, 2.0),
            sink=EventLog(log),
        ),
        recording,
    )
    scheduler.add(Request("a", [1] * 7, 8, salt=b"\x00s", adapter="x", extras=(ExtraKey(0, 3, b"i"),), n=2), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(6, [1, 2], 4), 6, priority=2.0, stop_token_ids=(9,)), 0.25)
    with pytest.raises(RequestTooLargeError):
        scheduler.add(Request("huge", [1] * 100, 1), 0.5)
    clock = 1.0
    scheduler.fail(scheduler.schedule(clock), clock, "lost")
    while scheduler.has_work:
        plan = scheduler.schedule(clock)
        clock += 0.125
        scheduler.update(plan, [int(plan.step) % 8] * len(plan.sampling_rows), clock)
        if plan.step == 4:
            scheduler.add(Request("c", [5, 6], 3), clock)
        if plan.step == 5:
            scheduler.abort("c", clock)
    return recording.getvalue().splitlines(), log.getvalue()


def test_a_replay_gives_the_same_events_byte_for_byte() -> None:
    recording, log = record()
    again = io.StringIO()

    num_plans = sum(1 for _ in replay_recording(recording, EventLog(again)))

    assert again.getvalue() == log
    assert num_plans == sum('"call":"schedule"' in line for line in recording)
    for event in ("preempted", "refused", "aborted", "stepfailed", "finished"):
        assert f'"event":"{event}"' in log


def test_a_recording_that_leads_elsewhere_is_refused_by_its_line() -> None:
    recording, _ = record()
    header = json.loads(recording[0])
    header["scheduler"]["max_num_batched_tokens"] = 5

    with pytest.raises(RecordingError, match="line 5: step 0 was recorded with another plan"):
        list(replay_recording([json.dumps(header), *recording[1:]]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: expected a JSON object, found ''"),
        (["[]"], "line 1: expected a JSON object"),
        (['{"recording":99}'], "expected a recording of version 1, found 99"),
        (['{"recording":1}'], "the header does not describe a scheduler"),
        (["header", "{"], "line 2: expected a JSON object"),
        (
            ["header", '{"call":"dance","now":0}'],
            "line 2: expected add, abort, schedule, update or fail, found 'dance'",
        ),
        (["header", '{"call":"update","now":0,"token_ids":[]}'], "line 2: expected schedule before update"),
        (["header", '{"call":"abort","now":0}'], "line 2: expected a call with its arguments, no 'request_id' found"),
        (["header", "[" * 100_000], "line 2: expected a JSON object"),
    ],
    ids=str,
)
def test_a_malformed_recording_is_refused_by_its_line(lines: list[str], message: str) -> None:
    header = record()[0][0]

    with pytest.raises(RecordingError, match=message.replace("[", r"\[")):
        list(replay_recording([header if line == "header" else line for line in lines]))


def test_a_policy_that_a_recording_cannot_name_is_refused() -> None:
    class Mine(FCFS):
        pass

    scheduler = Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(8)), policy=Mine())

    with pytest.raises(ValueError, match="only name pagedkv's own policies"):
        Recorder(scheduler, io.StringIO())
