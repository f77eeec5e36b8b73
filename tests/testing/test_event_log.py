"""Each contradiction that a log can hold is planted into a sound one, and found under its name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from pagedkv import CacheConfig, InvalidArgumentError, InvariantViolation, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import EventLog, Recompute, Request, RequestTooLargeError, Scheduler, SchedulerConfig, Swap
from pagedkv.testing.event_log import check_event_log

LIMITS = {"max_num_running": 4, "num_blocks": 8, "max_tokens_per_step": 1}


def make_log(preemption: object) -> list[str]:
    """Six requests on eight blocks: refused, deferred, preempted, forked, aborted and finished ones, one failed step."""
    file = io.StringIO()
    scheduler = Scheduler(
        SchedulerConfig(16, 4, watermark=0),
        KVCacheManager(CacheConfig(8, 2, 8)),
        preemption=preemption,
        sink=EventLog(file),
    )
    for i, (num_prompt, num_new, n) in enumerate([(2, 5, 2), (3, 6, 1), (4, 6, 1), (5, 3, 1), (2, 2, 1)]):
        scheduler.add(Request(f"r{i}", SimulatedPrompt(num_prompt), num_new, n=n), 0.0)
    with pytest.raises(RequestTooLargeError):
        scheduler.add(Request("huge", SimulatedPrompt(99), 1), 0.0)
    for step in range(100):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule(float(step))
        if step == 2:
            scheduler.fail(plan, float(step), "the device was lost")
            continue
        scheduler.update(plan, None, float(step))
        if step == 5:
            scheduler.abort("r4", float(step))
    return file.getvalue().splitlines()


@pytest.fixture(scope="module", params=[Recompute(), Swap()], ids=["recompute", "swap"])
def log(request: pytest.FixtureRequest) -> list[str]:
    return make_log(request.param)


def test_a_sound_log_is_counted(log: list[str]) -> None:
    summary = check_event_log(log, **LIMITS, is_complete=True)

    assert summary.live == []
    assert (summary.num_added, summary.num_refused, summary.num_aborted_requests) == (5, 1, 1)
    assert (summary.num_finished_samples, summary.num_failed_steps) == (5, 1)
    assert summary.num_output_tokens == 6 + 6 + 5 + 5 + 3
    assert summary.num_preemptions > 0
    assert summary.max_seats == 4


def test_a_log_that_was_cut_at_its_beginning_is_sound(log: list[str]) -> None:
    for cut in range(1, len(log)):
        check_event_log(log[cut:], **LIMITS, is_from_start=False)


Records = list[dict[str, object]]


def first(records: Records, event: str, **fields: object) -> int:
    return next(
        i
        for i, record in enumerate(records)
        if record["event"] == event and all(record[name] == value for name, value in fields.items())
    )


def change(event: str, **fields: object) -> Callable[[Records], None]:
    """Overwrite fields of the first event of a kind."""
    return lambda records: records[first(records, event)].update(fields)


def repeat(event: str) -> Callable[[Records], None]:
    """Tell the first event of a kind twice."""

    def corrupt(records: Records) -> None:
        i = first(records, event)
        records.insert(i, dict(records[i]))

    return corrupt


def drop(event: str, **fields: object) -> Callable[[Records], None]:
    """Leave the first event of a kind out."""
    return lambda records: records.pop(first(records, event, **fields)) and None


def append(**fields: object) -> Callable[[Records], None]:
    return lambda records: records.append({"time": 99.0, **fields})


def move_back_in_time(records: Records) -> None:
    records[first(records, "finished")]["step"] = 0


def finish_at_once(records: Records) -> None:
    """All tokens of the last request in the step in which it was admitted."""
    admitted = records[max(i for i, record in enumerate(records) if record["event"] == "admitted")]
    finished = records[first(records, "finished", request_id=admitted["request_id"])]
    finished["step"] = admitted["step"]
    records.remove(finished)
    records.insert(records.index(admitted) + 1, finished)


CORRUPTIONS: dict[str, tuple[str, Callable[[Records], object]]] = {
    "an id is added twice": ("I9", repeat("added")),
    "a live id is refused": (
        "I12",
        lambda records: records.insert(1, {**records[0], "event": "refused", "reason": ""}),
    ),
    "a request was never added": ("I9", drop("added")),
    "a request is admitted twice": ("I15", repeat("admitted")),
    "a request is never admitted": ("I15", drop("admitted")),
    "a request is preempted twice": ("I15", repeat("preempted")),
    "a preemption is not told": ("I15", drop("preempted")),
    "a sample finishes twice": ("I9", repeat("finished")),
    "a request finishes while it waits": (
        "I15",
        lambda records: records.insert(
            1, {**records[first(records, "finished", request_id="r0")], "request_id": "r0", "step": 0}
        ),
    ),
    "a request ends twice": ("I9", append(event="aborted", request_id="r0", state="running")),
    "an event follows the end": ("I9", append(event="deferred", step=99, request_id="r0", reason="no seat")),
    "an abort tells of another state": ("I9", change("aborted", state="running")),
    "there are more seats than there should be": ("I15", lambda records: records[2].update(num_samples=5)),
    "there is no such sample": ("I15", change("admitted", sample_idx=7)),
    "more blocks are used than there are": ("I16", change("admitted", num_used_blocks=9)),
    "a running request uses no block": ("I16", change("admitted", num_used_blocks=0)),
    "used blocks are negative": ("I16", change("preempted", num_used_before=-1)),
    "a preemption gains nothing": (
        "I11",
        lambda records: (lambda record: record.update(num_used_after=record["num_used_before"]))(
            records[first(records, "preempted")]
        ),
    ),
    "a preemption costs blocks": (
        "I11",
        lambda records: (lambda record: record.update(num_used_after=record["num_used_before"] + 1))(
            records[first(records, "preempted")]
        ),
    ),
    "more is hit than was asked for": (
        "I16",
        lambda records: (lambda record: record.update(num_hit_tokens=record["num_known_tokens"]))(
            records[first(records, "admitted")]
        ),
    ),
    "a prompt grows": ("I15", change("admitted", num_known_tokens=5)),
    "a request comes back in another way": (
        "I16",
        lambda records: records[
            next(i for i, record in enumerate(records) if record.get("mode") in ("recomputed", "swapped in"))
        ].update(mode="new"),
    ),
    "preemptions are miscounted": ("I16", change("finished", num_preemptions=9)),
    "a preemption needs less than nothing": ("I16", change("preempted", num_needed_blocks=-7)),
    "a prompt is negative": ("I16", change("added", num_prompt_tokens=-4)),
    "an answer is to be negative": ("I16", change("added", max_new_tokens=-1)),
    "a request has no samples": ("I16", change("added", num_samples=0)),
    "nothing is used while others run": ("I16", change("preempted", num_used_after=0)),
    "an answer comes in the step of admission": ("I15", finish_at_once),
    "an answer is too long": ("I15", change("finished", num_output_tokens=99)),
    "an answer is too short": ("I15", change("finished", num_output_tokens=1)),
    "a step comes after a later one": ("I14", move_back_in_time),
    "a request is left behind": ("I10", lambda records: records.pop(first(records, "finished", request_id="r3"))),
    "a running request is deferred": (
        "I15",
        lambda records: records.insert(
            first(records, "admitted") + 1,
            {"event": "deferred", "time": 0.0, "step": 0, "request_id": "r0", "reason": "no seat"},
        ),
    ),
}


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_contradiction_is_found(log: list[str], invariant: str, corrupt: Callable[[Records], object]) -> None:
    records = [json.loads(line) for line in log]
    corrupt(records)

    with pytest.raises(InvariantViolation) as caught:
        check_event_log(map(json.dumps, records), **LIMITS, is_complete=True)

    assert caught.value.invariant == invariant, caught.value


def test_a_sample_that_is_preempted_more_often_than_may_be_is_found(log: list[str]) -> None:
    most = check_event_log(log).max_preemptions

    check_event_log(log, max_preemptions=most)
    with pytest.raises(InvariantViolation, match=f"I13.* was preempted, {most - 1} times before"):
        check_event_log(log, max_preemptions=most - 1)


def test_more_tokens_come_back_than_went_to_the_host() -> None:
    records = [json.loads(line) for line in make_log(Swap())]
    records[first(records, "admitted", mode="swapped in")]["num_hit_tokens"] -= 1

    with pytest.raises(InvariantViolation, match="I6"):
        check_event_log(map(json.dumps, records))


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "[1]", "[" * 100_000, "{}", '{"event":"exploded"}', '{"event":["added"]}', '{"event":"added","time":0}',
     '{"event":"refused","time":true,"request_id":"a","reason":""}',
     '{"event":"refused","time":NaN,"request_id":"a","reason":""}',
     '{"event":"refused","time":-Infinity,"request_id":"a","reason":""}',
     '{"event":"aborted","time":0,"request_id":"a","state":"finished"}',
     '{"event":"added","time":0,"request_id":"a","num_prompt_tokens":4,"max_new_tokens":1,"num_samples":"x"}'],
    ids=["empty", "no JSON", "list", "deep", "nothing", "unknown", "unhashable", "fields missing", "boolean", "NaN", "infinite",
         "unknown state", "samples"],
)  # fmt: skip
def test_a_line_that_is_no_event_is_an_error_with_its_number(line: str) -> None:
    with pytest.raises(InvalidArgumentError, match="event 1"):
        check_event_log([line])


@pytest.mark.parametrize(
    ("event", "field", "known"),
    [
        ("finished", "reason", "length, stop"),
        ("preempted", "mode", "recompute, swap"),
        ("admitted", "mode", "new, recomp"),
    ],
)
def test_a_word_that_no_scheduler_uses_is_an_error(log: list[str], event: str, field: str, known: str) -> None:
    records = [json.loads(line) for line in log]
    records[first(records, event)][field] = "teleported"

    with pytest.raises(InvalidArgumentError, match=f"{field} of '{event}' is 'teleported', expected one of {known}"):
        check_event_log(map(json.dumps, records))


def test_several_tokens_in_a_step_are_held_to_the_number_of_drafts(log: list[str]) -> None:
    records = [json.loads(line) for line in log]
    finish_at_once(records)
    num_tokens = 5

    check_event_log(map(json.dumps, records), max_tokens_per_step=num_tokens)
    check_event_log(map(json.dumps, records))
    with pytest.raises(InvariantViolation, match=r"I15.* tokens in 1 steps, at most 1 in each"):
        check_event_log(map(json.dumps, records), max_tokens_per_step=1)


def test_a_reused_id_is_a_new_request() -> None:
    file = io.StringIO()
    scheduler = Scheduler(SchedulerConfig(8, 2), KVCacheManager(CacheConfig(8, 2)), sink=EventLog(file))
    for _ in range(3):
        scheduler.add(Request("a", SimulatedPrompt(2), 1), 0.0)
        scheduler.update(scheduler.schedule(0.0), None, 0.0)

    assert check_event_log(file.getvalue().splitlines(), is_complete=True).num_finished_samples == 3
