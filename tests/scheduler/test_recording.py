"""A recording makes every decision again, and one that was tampered with is refused by line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    ExtraKey,
    InvalidArgumentError,
    InvariantViolation,
    KVCacheManager,
    SimulatedPrompt,
    StalePlanError,
)
from pagedkv.eviction import make_policy
from pagedkv.scheduler import (
    FCFS,
    Cheaper,
    EventLog,
    LatestArrival,
    LowestPriority,
    Priority,
    Recorder,
    RecordingError,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    StepOutcome,
    replay_recording,
)
from pagedkv.scheduler.events import Admitted


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
        ([], "line 1: expected a JSON object, found 0 characters"),
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
        (
            ["header", '{"call":"schedule","now":0,"drafts":5,"plan":""}'],
            "line 2: expected drafts as pairs of a row and its tokens, found int",
        ),
        (
            ["header", '{"call":"schedule","now":0,"drafts":[[3,[1]]],"plan":""}'],
            "line 2: the step cannot be planned again: drafts are given for row 3, in which nothing runs",
        ),
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


def record_drafts() -> tuple[list[str], str]:
    """Two requests, drafts of which some come true, a stopped row. Returns the recording and the event log."""
    log, recording = io.StringIO(), io.StringIO()
    manager = KVCacheManager(CacheConfig(8, 2))
    scheduler = Recorder(Scheduler(SchedulerConfig(32, 4, watermark=0), manager, sink=EventLog(log)), recording)
    scheduler.add(Request("a", [1, 2, 3], 9), 0.0)
    scheduler.add(Request("b", [4, 5, 6], 6), 0.0)
    scheduler.update(scheduler.schedule(0.0), [7, 7], 1.0)
    plan = scheduler.schedule(1.0, {1: (8, 9), np.int64(0): np.array([5, 6], np.int32)})
    scheduler.update(plan, StepOutcome([5, 6, 1, 8, 2], np.array([3, 2])), 2.0)
    scheduler.fail(scheduler.schedule(2.0, {0: [3]}), 2.0, "lost")
    scheduler.update(scheduler.schedule(2.0, {0: [3]}), [4, 4], 3.0)
    scheduler.update(scheduler.schedule(3.0, {}), StepOutcome([4, 4], stopped=[False, True]), 4.0)
    while scheduler.has_work:
        scheduler.update(scheduler.schedule(4.0), [1], 5.0)
    return recording.getvalue().splitlines(), log.getvalue()


def test_drafts_and_outcomes_are_recorded_and_replayed() -> None:
    recording, log = record_drafts()
    again = io.StringIO()

    plans = list(replay_recording(recording, EventLog(again)))

    assert again.getvalue() == log
    assert [None if plan.num_drafts is None else plan.num_drafts.tolist() for plan in plans[:5]] == [
        None,
        [2, 2],
        [1, 0],
        [1, 0],
        None,
    ]
    assert json.loads(recording[5])["drafts"] == [[1, [8, 9]], [0, [5, 6]]]
    assert json.loads(recording[6]) == {
        "call": "update",
        "now": 2.0,
        "token_ids": [5, 6, 1, 8, 2],
        "num_tokens": [3, 2],
        "stopped": None,
    }
    assert '"request_id":"b","sample_idx":0,"reason":"stop","num_output_tokens":5' in log


def test_calls_without_drafts_are_recorded_as_ever() -> None:
    recording, _ = record_drafts()

    assert list(json.loads(recording[3])) == ["call", "now", "plan"]
    assert recording[4] == '{"call":"update","now":1.0,"token_ids":[7,7]}'


def test_a_recording_with_other_drafts_is_refused_by_its_line() -> None:
    recording, _ = record_drafts()
    recording[5] = recording[5].replace("[5,6]", "[5,7]")

    with pytest.raises(RecordingError, match="line 6: step 1 was recorded with another plan"):
        list(replay_recording(recording))


def test_a_recording_of_before_there_were_drafts_replays() -> None:
    lines = [
        (
            '{"recording":1,"cache":{"num_blocks":8,"block_size":2,"num_host_blocks":0,"prefix_caching":true,'
            '"identity":{"model":"","kv_dtype":""}},"eviction":"lru","scheduler":{"max_num_batched_tokens":32,"max_num_running":4,'
            '"long_prefill_tokens":null,"chunked_prefill":true,"watermark":0,"max_bypasses":4},"policy":{"name":"FCFS"},'
            '"victim":{"name":"LowestPriority"},"preemption":{"name":"Recompute"}}'
        ),
        (
            '{"call":"add","now":0.0,"request":{"request_id":"a","max_new_tokens":2,"priority":0.0,"client":null,'
            '"adapter":null,"n":1,"reads_cache":true,"prompt":[1,2,3],"salt":"","extras":[],"stop_token_ids":[]}}'
        ),
        '{"call":"schedule","now":0.0,"plan":"0948902ff8b4bbe6"}',
        '{"call":"update","now":1.0,"token_ids":[7]}',
        '{"call":"schedule","now":1.0,"plan":"c8706ed790bce8fb"}',
        '{"call":"update","now":2.0,"token_ids":[8]}',
    ]

    assert [plan.num_tokens.tolist() for plan in replay_recording(lines)] == [[3], [1]]


def test_a_recording_of_before_there_was_a_bound_on_preemptions_replays_without_one() -> None:
    recording = io.StringIO()
    # The queue and the victims go by different orders, so that the first in the queue lose their seats again and again.
    policies = {"policy": Priority(0.0), "victim": LatestArrival()}
    limits = SchedulerConfig(256, 32, watermark=0, max_preemptions=1000)
    scheduler = Recorder(Scheduler(limits, KVCacheManager(CacheConfig(60, 4)), **policies), recording)
    rng = np.random.default_rng(0)
    most = num_steps = 0
    while num_steps < 120 or scheduler.has_work:
        if num_steps < 120 and num_steps % 4 == 0:
            prompt, new = SimulatedPrompt(int(rng.integers(1, 8))), int(rng.integers(1, 200))
            scheduler.add(Request(f"r{num_steps}", prompt, new, priority=-num_steps), 0.0)
        finished = scheduler.update(scheduler.schedule(0.0), None, 0.0).finished
        most = max([most, *(sample.num_preemptions for sample, _ in finished)])
        num_steps += 1
    lines = recording.getvalue().splitlines()
    header = json.loads(lines[0])
    del header["scheduler"]["max_preemptions"]

    assert most > SchedulerConfig().max_preemptions
    assert len(list(replay_recording([json.dumps(header), *lines[1:]]))) == num_steps


def test_a_recorder_shows_what_its_scheduler_shows() -> None:
    scheduler = Scheduler(SchedulerConfig(32, 1), KVCacheManager(CacheConfig(8, 4)))
    recorder = Recorder(scheduler, io.StringIO())
    recorder.add(Request("a", [1, 2, 3], 9), 0.0)
    recorder.add(Request("b", [4], 9), 0.0)
    recorder.update(recorder.schedule(0.0), [7], 0.0)
    plan = recorder.schedule(0.0)

    assert (recorder.num_running, recorder.num_waiting, recorder.has_work) == (1, 1, True)
    assert recorder.in_flight is plan
    assert recorder.running_rows.tolist() == [0]
    assert recorder.block_tables[0, 0] == 0
    assert recorder.outputs("a")[0].tolist() == [7]
    assert recorder.manager is scheduler.manager
    assert recorder.config is scheduler.config
    assert recorder.draft_counters is scheduler.draft_counters
    recorder.check_invariants()


def test_a_plan_whose_events_a_sink_refused_is_recorded() -> None:
    class Full:
        def emit(self, event: object) -> None:
            if isinstance(event, Admitted):
                raise OSError("the disk is full")

    recording = io.StringIO()
    scheduler = Recorder(Scheduler(SchedulerConfig(32, 4), KVCacheManager(CacheConfig(8)), sink=Full()), recording)
    scheduler.add(Request("a", [1, 2, 3], 2), 0.0)
    with pytest.raises(OSError, match="the disk is full"):
        scheduler.schedule(0.0)
    with pytest.raises(StalePlanError):
        scheduler.schedule(0.0)
    scheduler.update(scheduler.in_flight, [7], 0.0)
    scheduler.update(scheduler.schedule(0.0), [8], 0.0)

    plans = list(replay_recording(recording.getvalue().splitlines()))

    assert [plan.num_tokens.tolist() for plan in plans] == [[3], [1]]


def used_memory() -> KVCacheManager:
    manager = KVCacheManager(CacheConfig(8, 4))
    manager.open("x", [1, 2, 3])
    manager.close("x")
    return manager


def filled_memory() -> KVCacheManager:
    manager = KVCacheManager(CacheConfig(8, 4))
    manager.memory.pool.allocate(1)
    return manager


def with_a_request() -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(8, 4)))
    scheduler.add(Request("a", [1, 2, 3], 2), 0.0)
    return scheduler


def with_a_step() -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(), KVCacheManager(CacheConfig(8, 4)))
    scheduler.update(scheduler.schedule(0.0), [], 0.0)
    return scheduler


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheduler(SchedulerConfig(), used_memory()),
        lambda: Scheduler(SchedulerConfig(), filled_memory()),
        with_a_request,
        with_a_step,
    ],
    ids=["used memory", "filled memory", "a request", "a step"],
)
def test_what_was_used_before_it_is_recorded_is_refused(make) -> None:
    recording = io.StringIO()

    with pytest.raises(InvalidArgumentError, match="a recording begins with"):
        Recorder(make(), recording)

    assert recording.getvalue() == ""


def test_numbers_of_numpy_are_logged_and_recorded_as_plain_ones() -> None:
    log, recording = io.StringIO(), io.StringIO()
    three, half = np.int64(3), np.float32(0.5)
    manager = KVCacheManager(CacheConfig(np.int64(8), np.int32(4), np.int64(2)))
    limits = SchedulerConfig(np.int64(32), np.int64(4), np.int64(8), max_bypasses=three, max_preemptions=three)
    scheduler = Recorder(Scheduler(limits, manager, sink=EventLog(log)), recording)
    extras = (ExtraKey(np.int64(0), np.int64(1), b"i"),)
    stops = np.array([7, 9])
    scheduler.add(Request("a", [1, 2], three, n=np.int64(2), extras=extras, stop_token_ids=(*stops,)), now=half)
    scheduler.add(Request("b", SimulatedPrompt(np.int64(5), [1, 2], np.int64(4)), three), now=half)
    scheduler.add(Request("c", SimulatedPrompt(5, (), np.int64(4)), 1), now=half)
    scheduler.abort("c", now=half)
    scheduler.fail(scheduler.schedule(now=half), now=half)
    scheduler.update(scheduler.schedule(now=half), [7, 5, 6], now=half)
    again = io.StringIO()

    assert len(list(replay_recording(recording.getvalue().splitlines(), EventLog(again)))) == 2
    assert again.getvalue() == log.getvalue()
    assert '"time":0.5,' in log.getvalue()


def test_a_bug_of_ours_is_raised_and_not_taken_for_a_call_that_failed_when_recorded(monkeypatch) -> None:
    recording, _ = record()

    def broken(*arguments: object) -> None:
        raise InvariantViolation("I1", "planted")

    monkeypatch.setattr(Scheduler, "add", broken)
    with pytest.raises(InvariantViolation, match="I1: planted"):
        list(replay_recording(recording))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("salt", 5, "expected a request, found TypeError in it"),
        ("salt", "0g", "expected a request, found ValueError in it"),
        ("extras", [[0, 1]], "expected a request, found ValueError in it"),
        ("prompt", {"num_tokens": 3}, "expected a request, found KeyError in it"),
        ("n", 2000, "expected a request, found InvalidArgumentError in it"),
        ("nonsense", 1, "expected a request, found TypeError in it"),
    ],
)
def test_a_request_that_cannot_have_been_recorded_is_refused_by_its_line(field, value, message) -> None:
    recording, _ = record()
    add = json.loads(recording[1])
    add["request"][field] = value

    with pytest.raises(RecordingError, match=f"line 2: {message}"):
        list(replay_recording([recording[0], json.dumps(add), *recording[2:]]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache", "text"),
        ("cache", {"identity": 5}),
        ("eviction", []),
        ("scheduler", [1]),
        ("policy", "FCFS"),
        ("policy", 5),
    ],
)
def test_a_header_that_describes_no_scheduler_is_refused(field, value) -> None:
    header = json.loads(record()[0][0])
    header[field] = value

    with pytest.raises(RecordingError, match="line 1: the header does not describe a scheduler"):
        list(replay_recording([json.dumps(header)]))
