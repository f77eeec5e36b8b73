"""What the metrics say of small services whose every moment is known."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from itertools import pairwise
from threading import Event as Signal
from threading import Thread

import numpy as np
import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.engine.metrics import EngineMetrics
from pagedkv.scheduler import Recompute, Request, RequestTooLargeError, Scheduler, SchedulerConfig, StepOutcome, Swap


class Service:
    """A scheduler with metrics, a clock that only the tests move, and a model that always answers 7."""

    def __init__(self, *, num_blocks=64, block_size=2, max_running=8, max_tokens=64, preemption=None):
        self.metrics = EngineMetrics(max_model_len=100)
        self.scheduler = Scheduler(
            SchedulerConfig(max_tokens, max_running, watermark=0),
            KVCacheManager(CacheConfig(num_blocks, block_size, num_blocks)),
            sink=self.metrics,
            preemption=preemption,
        )
        self.metrics.watch(self.scheduler)
        self.clock = 0.0

    def add(self, request_id, num_prompt, num_new, **more):
        prompt = [ord(request_id[0])] * num_prompt
        self.scheduler.add(Request(request_id, prompt, num_new, **more), self.clock)

    def begin(self):
        return self.scheduler.schedule(self.clock)

    def end(self, plan, duration=0.5, tokens=None):
        start, self.clock = self.clock, self.clock + duration
        tokens = [7] * len(plan.sampling_rows) if tokens is None else tokens
        events = self.scheduler.update(plan, tokens, self.clock)
        self.metrics.on_step(plan, events, start, self.clock)
        return events

    def step(self, duration=0.5):
        plan = self.begin()
        self.end(plan, duration)
        return plan

    def run(self):
        while self.scheduler.has_work:
            self.step()
        return self.metrics.snapshot()


def values(histogram):
    """Number of values and their sum."""
    return histogram.count, histogram.total


def test_one_request_is_told_from_arrival_to_end():
    service = Service()
    service.clock = 0.25
    service.add("a", 4, 3)
    service.clock = 1.0

    snapshot = service.run()

    # Steps from 1.0 to 1.5, 2.0 and 2.5, with 4, 1 and 1 tokens.
    assert values(snapshot.request_queue_time_seconds) == (1, 0.75)
    assert values(snapshot.time_to_first_token_seconds) == (1, 1.25)
    assert values(snapshot.inter_token_latency_seconds) == (2, 1.0)
    assert values(snapshot.request_prefill_time_seconds) == (1, 0.5)
    assert values(snapshot.request_decode_time_seconds) == (1, 1.0)
    assert values(snapshot.e2e_request_latency_seconds) == (1, 2.25)
    assert values(snapshot.iteration_tokens_total) == (3, 6)
    assert values(snapshot.step_time_seconds) == (3, 1.5)
    assert values(snapshot.request_prompt_tokens) == (1, 4)
    assert values(snapshot.request_generation_tokens) == (1, 3)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens) == (4, 3)
    assert snapshot.request_success == {"length": 1, "stop": 0, "abort": 0}
    assert snapshot.num_preemptions == snapshot.num_requests_refused == snapshot.num_failed_steps == 0


def test_a_stop_token_is_another_reason():
    service = Service()
    service.add("a", 4, 9, stop_token_ids=[7])

    assert service.run().request_success == {"length": 0, "stop": 1, "abort": 0}


def test_gauges_follow_the_scheduler_without_a_step():
    service = Service(num_blocks=8, max_running=1)
    service.add("a", 4, 3)
    service.add("b", 4, 3)
    before = service.metrics.snapshot()
    service.step()
    during = service.metrics.snapshot()
    service.scheduler.abort("b", service.clock)
    after_abort = service.metrics.snapshot()
    at_the_end = service.run()

    gauges = [
        (snapshot.num_requests_running, snapshot.num_requests_waiting, snapshot.kv_cache_usage_perc)
        for snapshot in (before, during, after_abort, at_the_end)
    ]
    assert gauges == [(0, 2, 0.0), (1, 1, 0.25), (1, 0, 0.25), (0, 0, 0.0)]


def test_usage_grows_with_a_decode_in_which_nothing_else_happens():
    service = Service(num_blocks=8)
    service.add("a", 4, 4)

    service.step()
    service.step()

    assert service.metrics.snapshot().kv_cache_usage_perc == 0.375


def test_a_plan_without_rows_is_no_step():
    service = Service()

    service.step()

    snapshot = service.metrics.snapshot()
    assert (snapshot.iteration_tokens_total.count, snapshot.step_time_seconds.count) == (0, 0)


def test_gauges_are_zero_before_a_scheduler_is_watched():
    snapshot = EngineMetrics().snapshot()

    assert (snapshot.num_requests_running, snapshot.num_requests_waiting, snapshot.kv_cache_usage_perc) == (0, 0, 0.0)


def test_prefix_hits_are_counted_in_tokens_as_the_memory_counts_them():
    service = Service()
    service.add("a1", 5, 2)
    service.run()
    service.add("a2", 5, 2)

    snapshot = service.run()

    assert (snapshot.prefix_cache_queries, snapshot.prefix_cache_hits) == (10, 4)
    assert snapshot.prefix_cache_hit_rate == 0.4
    counters = service.scheduler.manager.memory.counters
    assert (counters.queried_tokens, counters.hit_tokens) == (10, 4)
    assert snapshot.prompt_tokens == 10


def test_a_row_that_is_used_again_begins_with_a_first_token():
    service = Service(max_running=1)
    service.add("a", 2, 2)
    service.add("b", 2, 2)

    snapshot = service.run()

    # Four steps of 0.5 s: a's tokens at 0.5 and 1.0, b's at 1.5 and 2.0 in the same row.
    assert values(snapshot.time_to_first_token_seconds) == (2, 2.0)
    assert values(snapshot.inter_token_latency_seconds) == (2, 1.0)
    assert values(snapshot.request_queue_time_seconds) == (2, 1.0)


@pytest.mark.parametrize("preemption", [Recompute(), Swap()])
def test_one_gap_spans_a_preemption(preemption):
    service = Service(num_blocks=4, preemption=preemption)
    service.add("a", 2, 6)
    service.add("b", 2, 6)
    rows = {}
    while service.scheduler.has_work:
        plan = service.step()
        for seat in plan.admitted:
            rows.setdefault(seat.request_id, []).append(seat.row)

    snapshot = service.metrics.snapshot()

    # Both get tokens at 0.5, 1.0 and 1.5; then each needs a third block, and b waits until a has its sixth at 3.0. Its
    # own fourth, fifth and sixth come at 3.5, 4.0 and 4.5: gaps 5 * 0.5 for a, and for b 0.5, 0.5, 2.0, 0.5, 0.5.
    assert snapshot.num_preemptions == 1
    assert len(rows["b"]) == 2
    assert values(snapshot.inter_token_latency_seconds) == (10, 6.5)
    assert snapshot.inter_token_latency_seconds.counts[9] == 9  # up to 0.5 s
    assert snapshot.inter_token_latency_seconds.counts[12] == 1  # up to 2.5 s
    assert values(snapshot.time_to_first_token_seconds) == (2, 1.0)
    assert values(snapshot.request_decode_time_seconds) == (2, 2.5 + 4.0)
    assert values(snapshot.request_queue_time_seconds) == (2, 0.0)
    # What comes back looks its own blocks up, and computes its prompt again: neither counts.
    assert (snapshot.prefix_cache_queries, snapshot.prompt_tokens, snapshot.generation_tokens) == (4, 4, 12)


def test_a_sample_that_comes_back_in_a_row_of_another_takes_its_time_along():
    service = Service(num_blocks=4)
    service.add("a", 2, 6)
    service.add("b", 2, 6)
    rows = {}
    while service.scheduler.has_work:
        for seat in service.step().admitted:
            rows.setdefault(seat.request_id, []).append(seat.row)

    assert rows == {"a": [0], "b": [1, 0]}


def test_a_request_with_two_samples_has_one_prompt_and_two_outputs():
    service = Service()
    service.add("a", 4, 3, n=2)

    snapshot = service.run()

    assert values(snapshot.time_to_first_token_seconds) == (2, 1.0)
    assert values(snapshot.inter_token_latency_seconds) == (4, 2.0)
    assert values(snapshot.e2e_request_latency_seconds) == (2, 3.0)
    assert values(snapshot.request_generation_tokens) == (2, 6)
    assert values(snapshot.request_queue_time_seconds) == (1, 0.0)
    assert values(snapshot.request_prefill_time_seconds) == (1, 0.5)
    assert values(snapshot.request_prompt_tokens) == (1, 4)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens) == (4, 6)
    assert snapshot.request_success["length"] == 2


def test_a_request_that_only_computes_its_prompt_has_no_first_token():
    service = Service()
    service.add("a", 4, 0)

    snapshot = service.run()

    assert values(snapshot.time_to_first_token_seconds) == (0, 0.0)
    assert values(snapshot.request_prefill_time_seconds) == (1, 0.5)
    assert values(snapshot.request_generation_tokens) == (1, 0)
    assert values(snapshot.e2e_request_latency_seconds) == (1, 0.5)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens) == (4, 0)


def test_a_chunked_prompt_counts_once_and_each_chunk_in_its_step():
    service = Service(max_tokens=8)
    service.add("a", 20, 1)

    snapshot = service.run()

    assert values(snapshot.iteration_tokens_total) == (3, 20)
    assert snapshot.iteration_tokens_total.counts[:3] == (0, 3, 0)
    assert values(snapshot.time_to_first_token_seconds) == (1, 1.5)
    assert snapshot.prompt_tokens == 20


def test_an_abort_while_waiting_running_and_in_flight():
    service = Service(max_running=2)
    service.add("a", 2, 5)
    service.add("b", 2, 5)
    service.add("c", 2, 5)
    service.scheduler.abort("c", 0.0)
    service.step()
    service.scheduler.abort("b", service.clock)
    plan = service.begin()
    service.scheduler.abort("a", service.clock)
    service.end(plan)

    snapshot = service.metrics.snapshot()

    assert snapshot.request_success == {"length": 0, "stop": 0, "abort": 3}
    assert values(snapshot.time_to_first_token_seconds) == (2, 1.0)
    assert values(snapshot.inter_token_latency_seconds) == (0, 0.0)
    assert values(snapshot.e2e_request_latency_seconds) == (0, 0.0)
    assert snapshot.generation_tokens == 2
    assert service.metrics._requests == {}


def test_a_request_aborted_right_after_its_first_step_leaves_no_gap():
    service = Service()
    service.add("a", 2, 1)
    service.run()
    service.add("b", 2, 5)
    plan = service.begin()
    events = service.scheduler.update(plan, [7], 1.0)
    service.scheduler.abort("b", 1.0)
    service.metrics.on_step(plan, events, 0.5, 1.0)

    snapshot = service.metrics.snapshot()

    assert values(snapshot.time_to_first_token_seconds) == (1, 0.5)
    assert values(snapshot.inter_token_latency_seconds) == (0, 0.0)


def test_a_name_taken_again_while_its_first_owner_is_in_flight_is_another_request():
    service = Service()
    service.add("a", 2, 3, n=2)
    plan = service.begin()
    service.scheduler.abort("a", service.clock)
    service.add("a", 2, 3)
    service.end(plan)

    snapshot = service.run()

    assert values(snapshot.time_to_first_token_seconds) == (1, 1.0)
    assert values(snapshot.inter_token_latency_seconds) == (2, 1.0)
    assert snapshot.request_success == {"length": 1, "stop": 0, "abort": 2}
    assert service.metrics._requests == {}


def test_a_refused_request_is_counted_and_nothing_else():
    service = Service(num_blocks=2)
    with pytest.raises(RequestTooLargeError):
        service.add("a", 9, 1)

    snapshot = service.metrics.snapshot()

    assert snapshot.num_requests_refused == 1
    assert (snapshot.num_requests_waiting, sum(snapshot.request_success.values())) == (0, 0)


def test_a_failed_step_costs_time_and_no_tokens():
    service = Service()
    service.add("a", 2, 2, n=2)
    service.scheduler.fail(service.begin(), 0.0, "no model")
    service.clock = 2.0

    snapshot = service.run()

    assert snapshot.num_failed_steps == 1
    assert values(snapshot.time_to_first_token_seconds) == (2, 5.0)
    assert values(snapshot.inter_token_latency_seconds) == (2, 1.0)
    assert values(snapshot.step_time_seconds) == (2, 1.0)
    assert values(snapshot.request_queue_time_seconds) == (1, 0.0)


def test_a_step_may_give_several_tokens_to_a_row():
    service = Service()
    for request_id in "abc":
        service.add(request_id, 2, 9)
    service.step()
    plan = service.scheduler.schedule(0.5, drafts={0: [7, 7, 7, 7], 1: [5, 5], 2: []})
    service.end(plan, tokens=StepOutcome([7, 7, 8, 6, 7], num_tokens=[3, 1, 1]))

    snapshot = service.metrics.snapshot()

    assert snapshot.generation_tokens == 3 + 5
    assert values(snapshot.inter_token_latency_seconds) == (3, 1.5)
    assert snapshot.iteration_tokens_total.total == 6 + 9
    assert snapshot.spec_decode_num_drafts == 2
    assert snapshot.spec_decode_num_draft_tokens == 6
    assert snapshot.spec_decode_num_accepted_tokens == 2


def test_drafts_of_a_request_that_was_aborted_in_flight_do_not_count():
    service = Service()
    service.add("a", 2, 9)
    service.add("b", 2, 9)
    service.step()
    plan = service.scheduler.schedule(0.5, drafts={0: [7, 7, 7, 7], 1: [7, 5]})
    service.scheduler.abort("a", 0.75)
    service.end(plan, tokens=StepOutcome([7, 7, 7, 8, 7, 4], num_tokens=[4, 2]))

    snapshot = service.metrics.snapshot()

    counters = service.scheduler.draft_counters
    assert (counters.num_drafts, counters.num_accepted_drafts) == (2, 1)
    assert snapshot.spec_decode_num_drafts == 1
    assert snapshot.spec_decode_num_draft_tokens == 2
    assert snapshot.spec_decode_num_accepted_tokens == 1
    assert snapshot.generation_tokens == 2 + 2


def test_more_rows_than_the_columns_had():
    service = Service(num_blocks=512, max_running=200, max_tokens=512)
    for i in range(200):
        service.add(f"{i}", 2, 3)

    snapshot = service.run()

    assert values(snapshot.time_to_first_token_seconds) == (200, 100.0)
    assert values(snapshot.inter_token_latency_seconds) == (400, 200.0)


def test_a_random_service_agrees_with_a_naive_count():
    random = np.random.default_rng(5)
    service = Service(num_blocks=12, max_running=5, max_tokens=9)
    arrivals, last, ttft, gaps, aborted = {}, {}, [], [], 0
    for number in range(400):
        if random.random() < 0.4:
            name = f"{'abc'[number % 3]}{number}"
            service.add(name, int(random.integers(1, 9)), int(random.integers(1, 9)), n=int(random.integers(1, 3)))
            arrivals[name] = service.clock
        plan = service.begin()
        if random.random() < 0.1:
            service.clock += 0.25
            service.scheduler.fail(plan, service.clock)
            continue
        live = service.scheduler._live
        if live and random.random() < 0.1:
            name = list(live)[int(random.integers(len(live)))]
            aborted += len(live[name])
            service.scheduler.abort(name, service.clock)
        for output in service.end(plan, float(random.integers(1, 64)) / 64).outputs:
            sample = (output.request_id, output.sample_idx)
            if sample in last:
                gaps.append(service.clock - last[sample])
            else:
                ttft.append(service.clock - arrivals[output.request_id])
            last[sample] = service.clock

    snapshot = service.metrics.snapshot()

    assert snapshot.num_preemptions > 10
    assert snapshot.num_requests_running == service.scheduler.num_running > 0
    assert snapshot.num_requests_waiting == service.scheduler.num_waiting
    assert snapshot.request_success["abort"] == aborted > 5
    for values_seen, histogram in (
        (ttft, snapshot.time_to_first_token_seconds),
        (gaps, snapshot.inter_token_latency_seconds),
    ):
        bounds = [-np.inf, *histogram.bounds, np.inf]
        counts = [sum(low < value <= high for value in values_seen) for low, high in pairwise(bounds)]
        assert list(histogram.counts) == counts
        assert histogram.total == sum(values_seen)
    assert set(service.metrics._requests) == set(service.scheduler._live)


def test_a_snapshot_does_not_change_and_is_json():
    service = Service()
    service.add("a", 4, 3)
    snapshot = service.metrics.snapshot()
    service.run()

    assert snapshot.generation_tokens == snapshot.step_time_seconds.count == snapshot.request_success["length"] == 0
    with pytest.raises(FrozenInstanceError):
        snapshot.generation_tokens = 1
    written = json.loads(json.dumps(service.metrics.snapshot().as_dict()))
    assert written["generation_tokens"] == 3
    assert written["request_success"] == {"length": 1, "stop": 0, "abort": 0}
    assert written["request_prompt_tokens"] == {
        "count": 1,
        "sum": 4.0,
        "bounds": [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0],
        "counts": [0, 0, 1, 0, 0, 0, 0, 0],
    }


def test_snapshots_from_another_thread_lie_between_steps():
    service = Service(num_blocks=256, max_running=64)
    for i in range(32):
        service.add(f"{i}", 2, 9)
    snapshots, is_over = [], Signal()

    def scrape():
        while not is_over.is_set():
            snapshots.append(service.metrics.snapshot())

    thread = Thread(target=scrape)
    thread.start()
    final = service.run()
    is_over.set()
    thread.join()

    assert final.generation_tokens == 32 * 9
    for snapshot in snapshots:
        told = snapshot.time_to_first_token_seconds.count + snapshot.inter_token_latency_seconds.count
        assert snapshot.generation_tokens == told
