"""S12: tokens and salts show up in no event, metric, error message or repr; a recording, which needs them, says so."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest

from pagedkv import CacheConfig, ExtraKey, KVCacheManager, PagedKVError
from pagedkv.scheduler import (
    EventLog,
    Recorder,
    Request,
    Scheduler,
    SchedulerConfig,
    StepOutcome,
    Swap,
    replay_recording,
)

TOKEN = 1_234_567_891
SALT = b"canary-salt-7f3a"
CANARIES = (str(TOKEN), SALT.decode(), SALT.hex(), repr(SALT)[2:-1])


def leaks(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text.replace("_", "").replace(",", "") or canary in text]


class Everything:
    """A sink that keeps the repr of all that it gets, beside the log."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self.log = EventLog(self.text)

    def emit(self, event) -> None:
        self.text.write(repr(event))
        self.log.emit(event)


def make_request(name: str, **fields) -> Request:
    return Request(name, [TOKEN] * 6, 5, **{"salt": SALT, "stop_token_ids": [TOKEN - 1, TOKEN + 1], **fields})


def test_events_statistics_and_reprs_of_a_service_hold_no_token_and_no_salt() -> None:
    sink = Everything()
    manager = KVCacheManager(CacheConfig(4, 4, 4))
    scheduler = Scheduler(SchedulerConfig(32, 4, watermark=0), manager, preemption=Swap(), sink=sink)
    shown = []
    for name in "abc":
        request = make_request(name, salt=SALT + name.encode(), extras=(ExtraKey(0, 2, b"d"),))
        scheduler.add(request, 0.0)
        shown.append(request)
    scheduler.abort("c", 0.0)
    while scheduler.has_work:
        rows = scheduler.running_rows[:1].tolist()
        plan = scheduler.schedule(1.0, {row: [TOKEN] for row in rows})
        counts = None if plan.num_drafts is None else plan.num_drafts + 1
        total = len(plan.sampling_rows) if counts is None else int(np.sum(counts))
        outcome = StepOutcome([TOKEN] * total, counts)
        events = scheduler.update(plan, outcome, 2.0)
        shown += [plan, plan.drafts, outcome, events, events.finished, scheduler.draft_counters, plan.inputs]
    hit = manager.lookup([TOKEN] * 6, salt=SALT)
    shown += [scheduler, manager, manager.memory, manager.statistics(), hit, hit.content, manager.memory.cache]
    text = sink.text.getvalue() + repr(shown) + str(shown)

    assert leaks(text) == []
    assert '"event":"preempted"' in text


def wrong_calls() -> Iterator[tuple[str, object]]:
    """Mistakes made next to canaries, each with what raises."""
    manager = KVCacheManager(CacheConfig(8, 2))
    manager.open("a", [TOKEN] * 3, salt=SALT)
    scheduler = Scheduler(SchedulerConfig(32, 4), KVCacheManager(CacheConfig(8, 2)))
    scheduler.add(make_request("live"), 0.0)
    scheduler.update(scheduler.schedule(0.0), [TOKEN], 0.0)
    plan = scheduler.schedule(0.0, {0: [TOKEN]})
    yield "open twice", lambda: manager.open("a", [TOKEN], salt=SALT)
    yield "a negative beside it", lambda: manager.open("b", [TOKEN, -1], salt=SALT)
    yield "too large beside it", lambda: manager.open("b", [TOKEN, 2**31], salt=SALT)
    yield "a float beside it", lambda: manager.open("b", [TOKEN, 0.5], salt=SALT)
    yield "text beside it", lambda: manager.open("b", [TOKEN, "x"], salt=SALT)
    yield "nested", lambda: manager.open("b", [[TOKEN], [TOKEN, TOKEN]], salt=SALT)
    yield "a list in an array", lambda: manager.open("b", np.array([[TOKEN]]), salt=SALT)
    yield "too long a salt", lambda: manager.open("b", [TOKEN], salt=SALT * 5)
    yield "a salt of text", lambda: manager.open("b", [TOKEN], salt=SALT.decode())
    yield "wrong extras", lambda: manager.open("b", [TOKEN], salt=SALT, extras=[SALT])
    yield "extend", lambda: manager.extend("a", [TOKEN, -1])
    yield "add twice", lambda: scheduler.add(make_request("live"), 0.0)
    yield "too large a request", lambda: scheduler.add(Request("huge", [TOKEN] * 99, 5, salt=SALT), 0.0)
    yield "a request with a wrong salt", lambda: Request("x", [TOKEN], 1, salt=SALT.decode())
    yield "a request with a wrong stop", lambda: Request("x", [TOKEN], 1, stop_token_ids=[TOKEN, -1])
    yield "too many tokens", lambda: scheduler.update(plan, [TOKEN] * 9, 0.0)
    yield "a wrong draft", lambda: scheduler.update(plan, StepOutcome([TOKEN - 1, TOKEN], [2]), 0.0)
    yield "wrong drafts", lambda: Scheduler.schedule(scheduler, 0.0, {0: TOKEN})


WRONG = [name for name, _ in wrong_calls()]


@pytest.mark.parametrize("name", WRONG)
def test_no_error_shows_a_token_or_a_salt(name: str) -> None:
    with pytest.raises(PagedKVError) as error:
        dict(wrong_calls())[name]()

    assert leaks(str(error.value) + repr(error.value)) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-1],
        lambda line: line.replace('"plan"', '"plans"'),
        lambda line: line.replace('"request":{', '"request":[{'),
        lambda line: line.replace(f"[{TOKEN}", f"[{TOKEN}.5"),
        lambda line: line.replace('"token_ids":', '"token_ids":[],"num_tokens":'),
        lambda line: line.replace('"drafts":', '"drafts":3,"x":'),
        lambda line: line.replace('"drafts":[[', f'"drafts":[[{TOKEN}],['),
    ],
)
def test_a_damaged_recording_is_refused_without_showing_what_it_holds(damage) -> None:
    recording = io.StringIO()
    scheduler = Recorder(Scheduler(SchedulerConfig(32, 4), KVCacheManager(CacheConfig(8, 4))), recording)
    scheduler.add(make_request("a"), 0.0)
    scheduler.update(scheduler.schedule(0.0), [TOKEN], 0.0)
    scheduler.update(scheduler.schedule(0.0, {0: [TOKEN]}), [TOKEN], 0.0)
    lines = recording.getvalue().splitlines()
    assert leaks(recording.getvalue())
    refusals = []
    for number in range(1, len(lines)):
        damaged = [*lines[:number], damage(lines[number]), *lines[number + 1 :]]
        with contextlib.suppress(PagedKVError):
            list(replay_recording(damaged))
            continue
        with pytest.raises(PagedKVError) as refusal:
            list(replay_recording(damaged))
        refusals.append(str(refusal.value))

    assert refusals
    assert [found for message in refusals for found in leaks(message)] == []


def test_the_scan_finds_what_is_planted() -> None:
    assert leaks(f"prompt [{TOKEN}]") == [str(TOKEN)]
    assert leaks(json.dumps({"salt": SALT.hex()})) == [SALT.hex()]
    assert leaks("[1,234,567,891]") == [str(TOKEN)]
    assert leaks(repr({"salt": SALT}))
