"""Whatever the scheduler does to a request, its answer is the one that it would get alone on an empty machine."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedkv import UnknownIdError
from pagedkv.scheduler import (
    Cheaper,
    EventLog,
    LowestPriority,
    Priority,
    Recompute,
    Recorder,
    Request,
    SchedulerConfig,
    Swap,
    replay_recording,
)

PREEMPTIONS = {"recompute": Recompute(), "swap": Swap(), "cheaper": Cheaper(1.0, 3.0)}
COMMON_PROMPT = [1, 2, 3, 4, 5, 6, 7]

scenarios = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "block_size": st.sampled_from([1, 2, 3, 4]),
        "num_blocks": st.integers(24, 60),
        "num_host_blocks": st.sampled_from([1, 8, 60]),
        "preemption": st.sampled_from(sorted(PREEMPTIONS)),
        "by_priority": st.booleans(),
        "prefix_caching": st.booleans(),
        "budget": st.sampled_from([4, 9, 64]),
        "cap": st.sampled_from([None, 3]),
        "fail_rate": st.sampled_from([0.0, 0.2]),
        "abort_rate": st.sampled_from([0.0, 0.05]),
    }
)


def random_request(index: int, rng: np.random.Generator) -> Request:
    shared = COMMON_PROMPT[: int(rng.integers(0, 8))]
    prompt = shared + rng.integers(0, 5, int(rng.integers(1, 9))).tolist()
    num_samples = 1 if rng.random() < 0.7 else int(rng.integers(2, 4))
    return Request(f"r{index}", prompt, int(rng.integers(0, 10)), n=num_samples, priority=float(rng.integers(0, 3)))


@given(scenarios)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_survive_preemption_failure_abort_and_sharing(make_service, scenario) -> None:
    rng = np.random.default_rng(scenario["seed"])
    order = {"policy": Priority(), "victim": LowestPriority()} if scenario["by_priority"] else {}
    log, recording = io.StringIO(), io.StringIO()
    service = make_service(
        SchedulerConfig(scenario["budget"], min(4, scenario["budget"]), long_prefill_tokens=scenario["cap"]),
        num_blocks=scenario["num_blocks"],
        block_size=scenario["block_size"],
        num_host_blocks=scenario["num_host_blocks"],
        prefix_caching=scenario["prefix_caching"],
        preemption=PREEMPTIONS[scenario["preemption"]],
        sink=EventLog(log),
        **order,
    )
    scheduler = service.scheduler = Recorder(service.scheduler, recording)
    requests: dict[str, Request] = {}
    aborted: set[str] = set()
    for _ in range(3000):
        if len(requests) < 8 and rng.random() < 0.5:
            request = random_request(len(requests), rng)
            requests[request.request_id] = request
            service.add(request)
        elif not scheduler.has_work and len(requests) == 8:
            break
        plan = scheduler.schedule(service.clock)
        if requests and rng.random() < scenario["abort_rate"]:
            victim = f"r{rng.integers(len(requests))}"
            try:
                scheduler.abort(victim, service.clock)
                aborted.add(victim)
            except UnknownIdError:
                pass
        if rng.random() < scenario["fail_rate"]:
            service.engine.spoil(plan)
            scheduler.fail(plan, service.clock, "the device was lost")
        else:
            service.finish(plan)
        scheduler.scheduler.check_invariants()

    assert not scheduler.has_work
    assert scheduler.scheduler.manager.statistics().num_used == 0
    for request_id, request in requests.items():
        for sample_idx in range(request.n if request.max_new_tokens else 0):
            answer = service.answers.get((request_id, sample_idx), [])
            expected = make_service.continue_prompt(request.prompt, request.max_new_tokens, sample_idx)
            if request_id in aborted:
                assert answer == expected[: len(answer)]
            else:
                assert answer == expected

    again = io.StringIO()
    for _ in replay_recording(recording.getvalue().splitlines(), EventLog(again)):
        pass
    assert again.getvalue() == log.getvalue()


@pytest.mark.parametrize("mode", sorted(PREEMPTIONS))
def test_a_tight_pool_preempts_and_still_answers_right(make_service, mode) -> None:
    service = make_service(
        SchedulerConfig(32, 4, watermark=0), num_blocks=8, num_host_blocks=8, preemption=PREEMPTIONS[mode]
    )
    prompts = {f"r{i}": [i + 1, i + 2, i + 3] for i in range(4)}
    for request_id, prompt in prompts.items():
        service.add(Request(request_id, prompt, 14))

    service.run()

    for request_id, prompt in prompts.items():
        assert service.answers[request_id, 0] == make_service.continue_prompt(prompt, 14)
