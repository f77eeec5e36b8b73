"""What the strategies draw is sound, reaches what it should, and finds what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig
from pagedkv.simulations.traces import Trace
from pagedkv.simulations.traces.checks import find_problem
from pagedkv.testing.scheduler_shadow import ShadowEngine, answers_to
from pagedkv.testing.soak import Fault, FaultKind, ScriptedFaults, World, draw_service
from pagedkv.testing.strategies import DrawnTrace, faults, requests, traces

QUICK = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])  # Found is enough.


def as_trace(drawn: DrawnTrace) -> Trace:
    return Trace.from_columns(
        [request.arrival_s for request in drawn.requests],
        [request.prompt_tokens for request in drawn.requests],
        [request.output_tokens for request in drawn.requests],
        clients=[request.client for request in drawn.requests],
        content_block_size=drawn.content_block_size,
        content_runs=[[(content_id, 1) for content_id in request.content_ids] for request in drawn.requests],
    )


@given(traces())
@settings(max_examples=100, deadline=None)
def test_every_trace_is_sound(drawn: DrawnTrace) -> None:
    assert find_problem(as_trace(drawn)) is None


@pytest.mark.parametrize(
    "wanted",
    [
        lambda drawn: len({request.arrival_s for request in drawn.requests}) < len(drawn.requests),
        lambda drawn: len({request.content_ids[0] for request in drawn.requests}) < len(drawn.requests),
        lambda drawn: any(request.prompt_tokens % drawn.content_block_size for request in drawn.requests),
        lambda drawn: any(request.output_tokens == 0 for request in drawn.requests),
    ],
    ids=["equal times", "shared prefixes", "parts of blocks", "prompts only"],
)
def test_traces_with_this_are_drawn(wanted: object) -> None:
    find(traces(), wanted, settings=QUICK)


@given(st.lists(requests(), min_size=1, max_size=4, unique_by=lambda request: request.request_id))
@settings(max_examples=50, deadline=None)
def test_every_request_is_served_as_without_a_cache(drawn: list[Request]) -> None:
    scheduler = Scheduler(SchedulerConfig(16, 12), KVCacheManager(CacheConfig(60, 2)))
    engine = ShadowEngine(scheduler)
    answers = {request.request_id: answers_to(request) for request in drawn}
    for request in drawn:
        # Salted requests begin with another state, which the engine would have to be told.
        scheduler.add(Request(request.request_id, request.prompt, request.max_new_tokens, n=request.n), 0.0)
        plain = Request(request.request_id, request.prompt, request.max_new_tokens, n=request.n)
        answers[request.request_id] = answers_to(plain)
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        engine.take_seats(plan)
        engine.move_blocks(plan)
        for output in scheduler.update(plan, engine.compute(plan), 0.0).outputs:
            answer = answers[output.request_id][output.sample_idx]
            assert output.token_id == answer.token_ids[answer.num_given]
            answer.num_given += 1


@pytest.mark.parametrize(
    "wanted",
    [
        lambda request: request.n > 1,
        lambda request: len(request.stop_token_ids) > 0,
        lambda request: request.max_new_tokens == 0,
        lambda request: len(request.salt) > 1,
        lambda request: request.priority < 0,
    ],
    ids=["samples", "stops", "prompt only", "salt", "priority"],
)
def test_requests_with_this_are_drawn(wanted: object) -> None:
    find(requests(), wanted, settings=QUICK)


@given(faults(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_service_survives_whatever_faults_are_drawn(drawn: list[Fault], seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = World(draw_service(rng), rng, ScriptedFaults(drawn))
    for _ in range(80):
        world.step()
    world.drain()


@pytest.mark.parametrize("kind", FaultKind)
def test_every_kind_of_fault_is_drawn(kind: FaultKind) -> None:
    assert find(faults(), lambda drawn: any(fault.kind is kind for fault in drawn), settings=QUICK)
