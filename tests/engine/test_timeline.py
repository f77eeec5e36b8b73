"""The timeline file: whole JSON, parts within steps, phases of requests that follow one another."""

from __future__ import annotations

import io
import json
from collections import defaultdict

import numpy as np
import pytest

from pagedkv import CacheConfig, InvalidArgumentError, KVCacheManager
from pagedkv.engine import trace_file
from pagedkv.engine.timeline import StepTimes, Timeline
from pagedkv.scheduler import Recompute, Request, RequestTooLargeError, Scheduler, SchedulerConfig, Swap
from pagedkv.scheduler.events import Refused


class Service:
    """A scheduler with a timeline; each step takes 8 ms: 1 to schedule, 4 for the model, 2 to sample, 1 to update."""

    def __init__(self, *, num_blocks=64, block_size=2, max_running=8, max_tokens=64, preemption=None, file=None):
        self.file = io.StringIO() if file is None else file
        self.timeline = Timeline(self.file)
        self.scheduler = Scheduler(
            SchedulerConfig(max_tokens, max_running, watermark=0),
            KVCacheManager(CacheConfig(num_blocks, block_size, num_blocks)),
            sink=self.timeline,
            preemption=preemption,
        )
        self.timeline.watch(self.scheduler)
        self.clock = 0.0

    def add(self, request_id, num_prompt, num_new, **more):
        self.scheduler.add(Request(request_id, [ord(request_id[0])] * num_prompt, num_new, **more), self.clock)

    def begin(self):
        plan = self.scheduler.schedule(self.clock)
        self.timeline.on_schedule(plan)
        return plan

    def end(self, plan):
        moments = [self.clock + ms / 1000 for ms in (0, 1, 5, 7, 8)]
        self.clock = moments[-1]
        events = self.scheduler.update(plan, [7] * len(plan.sampling_rows), self.clock)
        self.timeline.on_step(plan, events, StepTimes(*moments))

    def run(self):
        """Step to the end; returns the events in the file."""
        while self.scheduler.has_work:
            self.end(self.begin())
        return self.close()

    def close(self):
        self.timeline.close()
        return json.loads(self.file.getvalue())


def steps(events):
    parts = ("schedule", "model", "sample", "update")
    return [event for event in events if event["ph"] == "X" and event["name"] not in parts]


def phases(events):
    """Phases of each track in ms, by the name of the track. Checks that they nest."""
    stacks, names, found = defaultdict(list), {}, defaultdict(list)
    for event in sorted((event for event in events if event["ph"] in "be"), key=lambda event: event["ts"]):
        track = event["id"]
        if event["ph"] == "b":
            names.setdefault(track, event["name"])
            stacks[track].append((event["name"], event["ts"]))
            assert len(stacks[track]) <= 2
        else:
            name, start = stacks[track].pop()
            assert name == event["name"]
            if stacks[track]:
                found[names[track]].append((name, start / 1000, event["ts"] / 1000))
    assert not any(stacks.values())
    return dict(found)


def counter(events, name):
    return [
        (event["ts"] / 1000, event["args"]["value"]) for event in events if event["ph"] == "C" and event["name"] == name
    ]


def marks(events, name):
    return [event for event in events if event["ph"] == "i" and event["name"] == name]


def test_a_step_has_a_name_and_numbers_and_its_parts_within_it():
    service = Service(max_tokens=8)
    service.add("a", 4, 3)
    service.end(service.begin())
    service.add("b", 6, 1)
    events = service.run()

    first, second, third = steps(events)
    assert first == {
        "name": "prefill 4",
        "ph": "X",
        "pid": 1,
        "tid": 3,
        "ts": 0.0,
        "dur": 8000.0,
        "args": {"step": 0, "num_rows": 1, "num_tokens": 4, "num_waiting": 0, "num_used_blocks": 2},
    }
    assert (second["name"], second["args"]["num_tokens"], second["args"]["num_used_blocks"]) == (
        "prefill 6 + decode 1",
        7,
        6,
    )
    assert (third["name"], third["ts"], third["dur"]) == ("decode 1", 16000.0, 8000.0)
    parts = [event for event in events if event["ph"] == "X" and event not in (first, second, third)]
    assert [(part["name"], part["ts"], part["dur"]) for part in parts[4:8]] == [
        ("schedule", 8000.0, 1000.0),
        ("model", 9000.0, 4000.0),
        ("sample", 13000.0, 2000.0),
        ("update", 15000.0, 1000.0),
    ]
    assert {(part["pid"], part["tid"]) for part in parts} == {(1, 3)}


def test_a_chunk_of_a_prompt_is_prefill_even_if_it_is_one_token():
    service = Service(max_tokens=8)
    service.add("a", 9, 2)

    assert [step["name"] for step in steps(service.run())] == ["prefill 8", "prefill 1", "decode 1"]


def test_a_plan_without_rows_is_a_step_too():
    service = Service()

    service.end(service.begin())

    assert [step["name"] for step in steps(service.close())] == ["empty"]


def test_a_request_queues_prefills_and_decodes():
    service = Service(max_running=1)
    service.add("a", 4, 3)
    service.add('b "2"', 4, 1)

    events = service.run()

    assert phases(events) == {
        "a": [("queue", 0.0, 0.0), ("prefill", 0.0, 8.0), ("decode", 8.0, 24.0)],
        'b "2"': [("queue", 0.0, 24.0), ("prefill", 24.0, 32.0)],
    }
    begin, end = (event for event in events if event["name"] == "a")
    assert begin["args"] == {"prompt_tokens": 4, "max_new_tokens": 3}
    assert end["args"] == {"finish_reason": "length", "output_tokens": 3}


@pytest.mark.parametrize(
    ("preemption", "mode", "comes_back_to"), [(Recompute(), "recompute", "prefill"), (Swap(), "swap", "decode")]
)
def test_a_preempted_request_comes_back(preemption, mode, comes_back_to):
    service = Service(num_blocks=4, preemption=preemption)
    service.add("a", 2, 6)
    service.add("b", 2, 6)

    events = service.run()

    # b has three tokens when both need a third block at 24 ms, and waits until a has its sixth token at 48 ms.
    assert phases(events)["b"][:5] == [
        ("queue", 0.0, 0.0),
        ("prefill", 0.0, 8.0),
        ("decode", 8.0, 24.0),
        ("preempted", 24.0, 48.0),
        (comes_back_to, 48.0, 56.0 if mode == "recompute" else 72.0),
    ]
    (mark,) = marks(events, "preemption")
    assert (mark["ts"], mark["pid"], mark["tid"]) == (24000.0, 1, 1)
    assert mark["args"] == {
        "request": "b",
        "mode": mode,
        "step": 3,
        "num_computed_tokens": 4,
        "num_used_before": 4,
        "num_used_after": 2,
    }
    names = [step["name"] for step in steps(events)]
    assert names[:7] == ["prefill 4", "decode 2", "decode 2", *["decode 1"] * 3, names[6]]
    assert names[6] == ("prefill 5" if mode == "recompute" else "decode 1")


def test_a_second_sample_has_a_track_from_its_first_token():
    service = Service()
    service.add("a", 4, 3, n=2)

    assert phases(service.run()) == {
        "a": [("queue", 0.0, 0.0), ("prefill", 0.0, 8.0), ("decode", 8.0, 24.0)],
        "a #1": [("decode", 8.0, 24.0)],
    }


def test_aborted_requests_end_where_they_were():
    service = Service(max_running=1)
    service.add("a", 4, 3)
    service.add("b", 4, 3)
    service.scheduler.abort("b", 0.0)
    plan = service.begin()
    service.scheduler.abort("a", 0.004)
    service.add("a", 4, 1)
    service.end(plan)

    events = service.run()

    by_track = [
        event for event in events if event["ph"] == "e" and event.get("args", {}).get("finish_reason") == "abort"
    ]
    assert [(event["name"], event["ts"]) for event in by_track] == [("b", 0.0), ("a", 4000.0)]
    assert phases(events)["a"] == [
        ("queue", 0.0, 0.0),
        ("prefill", 0.0, 4.0),
        ("queue", 0.0, 8.0),
        ("prefill", 8.0, 16.0),
    ]
    assert counter(events, "requests waiting") == [
        (0.0, 1),
        (0.0, 0),
        (8.0, 1),
        (8.0, 0),
    ]


def test_a_request_takes_the_row_of_a_sample_whose_step_failed():
    service = Service()
    service.add("a", 4, 2, n=2)
    service.scheduler.fail(service.begin(), 0.0)
    service.add("b", 6, 2)

    events = service.run()

    assert [step["name"] for step in steps(events)] == ["prefill 10", "decode 3"]
    assert phases(events) == {
        "a": [("queue", 0.0, 0.0), ("prefill", 0.0, 8.0), ("decode", 8.0, 16.0)],
        "a #1": [("decode", 8.0, 16.0)],
        "b": [("queue", 0.0, 0.0), ("prefill", 0.0, 8.0), ("decode", 8.0, 16.0)],
    }


def test_more_rows_than_the_columns_had():
    service = Service(num_blocks=512, max_running=100, max_tokens=512)
    for i in range(100):
        service.add(f"{i}", 2, 2)

    events = service.run()

    assert [step["name"] for step in steps(events)] == ["prefill 200", "decode 100"]
    assert len(phases(events)) == 100


def test_counters_have_a_point_per_change_and_end_at_zero():
    service = Service(max_running=1)
    service.add("a", 4, 3)
    service.add("b", 4, 1)

    events = service.run()

    assert counter(events, "KV blocks used") == [(0.0, 2), (8.0, 3), (24.0, 0), (24.0, 2), (32.0, 0)]
    assert counter(events, "requests running") == [(0.0, 1), (24.0, 0), (24.0, 1), (32.0, 0)]
    assert counter(events, "requests waiting") == [(0.0, 1), (24.0, 0)]


def test_refused_requests_and_failed_steps_are_marked():
    service = Service(num_blocks=2)
    with pytest.raises(RequestTooLargeError):
        service.add("big", 9, 1)
    service.add("a", 2, 1, n=2)
    service.scheduler.fail(service.begin(), 0.003, "no memory")

    events = service.run()

    (refused,) = marks(events, "rejection")
    assert (refused["tid"], refused["args"]["request"]) == (2, "big")
    assert refused["args"]["reason"] == "9 prompt + 1 new tokens need 5 blocks of 2, the pool has 2"
    (failed,) = marks(events, "step failed")
    assert (failed["ts"], failed["tid"]) == (3000.0, 3)
    assert failed["args"] == {"step": 0, "num_rows": 1, "reason": "no memory"}
    assert [step["name"] for step in steps(events)] == ["prefill 2"]


def test_a_random_service_leaves_a_file_in_order():
    random = np.random.default_rng(3)
    service = Service(num_blocks=12, max_running=5, max_tokens=9)
    for number in range(300):
        if random.random() < 0.3:
            service.add(
                f"r{number}", int(random.integers(1, 9)), int(random.integers(2, 9)), n=int(random.integers(1, 3))
            )
        plan = service.begin()
        if random.random() < 0.1:
            service.clock += 0.25
            service.scheduler.fail(plan, service.clock)
            continue
        live = service.scheduler._live
        if live and random.random() < 0.1:
            service.scheduler.abort(list(live)[int(random.integers(len(live)))], service.clock)
        service.end(plan)
        assert service.timeline._num_prefilling == np.count_nonzero(service.timeline._is_prefill)
        seated = {row for row, track in enumerate(service.timeline._seated) if track is not None and track.phase}
        assert seated == set(service.scheduler.running_rows.tolist())

    events = service.run()

    assert len(marks(events, "preemption")) > 10
    assert service.timeline._tracks == {}
    assert service.timeline._num_prefilling == 0
    assert len(phases(events)) > 60
    by_thread = defaultdict(list)
    for event in events:
        if event["ph"] in "XiC":
            by_thread[event["ph"], event["name"] if event["ph"] == "C" else event["tid"]].append(event["ts"])
    for times in by_thread.values():
        assert times == sorted(times)
    open_until = []
    for event in (event for event in events if event["ph"] == "X"):
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        assert not open_until or event["ts"] + event["dur"] <= open_until[-1] + 1e-6
        open_until.append(event["ts"] + event["dur"])


def test_a_file_without_its_end_holds_every_event_up_to_the_last_second(tmp_path):
    path = tmp_path / "engine.trace.json"
    service = Service(file=path)
    service.add("a", 2, 100)
    service.clock = 5.0
    service.end(service.begin())
    service.end(service.begin())

    events = json.loads(path.read_text() + "]")

    assert [step["name"] for step in steps(events)] == ["prefill 2"]
    service.clock = 6.5
    service.end(service.begin())
    assert len(steps(json.loads(path.read_text() + "]"))) == 3
    service.timeline.close()
    assert len(steps(json.loads(path.read_text()))) == 3


def test_no_more_than_64_kib_wait_in_memory():
    service = Service()
    service.add("a", 2, 100)
    service.clock = 5.0
    service.end(service.begin())
    written = len(service.file.getvalue())

    for _ in range(90):
        service.timeline.emit(Refused(5.1, "x" * 1000, "too large"))

    assert len(service.file.getvalue()) > written + 2**16
    json.loads(service.file.getvalue() + "]")


def test_moments_that_do_not_ascend_are_refused_and_nothing_is_written():
    service = Service()
    plan = service.begin()
    events = service.scheduler.update(plan, [], 1.0)

    with pytest.raises(InvalidArgumentError, match="must ascend"):
        service.timeline.on_step(plan, events, StepTimes(1.0, 2.0, 1.5, 3.0, 4.0))

    assert steps(service.close()) == []


def test_after_closing_nothing_is_written_and_the_engine_goes_on():
    service = Service()
    with service.timeline:
        service.add("a", 2, 3)
        service.end(service.begin())
    written = service.file.getvalue()

    service.run()
    service.timeline.close()

    assert service.file.getvalue() == written
    assert service.timeline._file._lines == []
    assert not service.file.closed


def test_a_file_of_its_own_is_closed(tmp_path):
    timeline = Timeline(tmp_path / "t.json")
    timeline.close()

    names = [event["args"]["name"] for event in json.loads((tmp_path / "t.json").read_text())]
    assert names == ["engine", "requests", "steps", "preemptions", "rejections"]


def test_a_trace_file_without_events_is_an_empty_array():
    file = io.StringIO()
    trace_file.TraceFile(file).close()

    assert json.loads(file.getvalue()) == []
