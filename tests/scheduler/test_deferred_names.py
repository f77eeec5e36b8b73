"""Names that wait a few steps: nobody can tell, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, RequestTooLargeError, Scheduler, SchedulerConfig, StepEvents, StepPlan, Swap
from pagedkv.testing.state_digest import state_digest


class Twins:
    """A scheduler that lets names wait, and one that does not: whatever is done to both must look the same."""

    def __init__(self, config: CacheConfig) -> None:
        limits, policies = SchedulerConfig(max_num_batched_tokens=32, max_num_running=6), {}
        if config.num_host_blocks:
            policies = {"preemption": Swap()}
        self.both = [Scheduler(limits, KVCacheManager(config), **policies) for _ in range(2)]
        self.both[1].manager.memory.naming._most_deferred = 1

    def do(self, verb: Callable[[Scheduler], Any]) -> list[Any]:
        results = []
        for scheduler in self.both:
            try:
                results.append(verb(scheduler))
            except RequestTooLargeError as error:
                results.append(str(error))
        return results

    def plans(self) -> list[StepPlan]:
        plans: list[StepPlan] = self.do(lambda scheduler: scheduler.schedule(0.0))
        first, second = (
            [plan.rows, plan.starts, plan.num_tokens, plan.slot_mapping, plan.token_ids, plan.copies.targets]
            for plan in plans
        )
        assert [array.tolist() for array in first] == [array.tolist() for array in second]
        return plans

    def check_state(self) -> None:
        first, second = (state_digest(scheduler.manager) for scheduler in self.both)
        assert first == second


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(12))
def test_names_that_wait_are_found_as_if_they_had_been_given_at_once(seed: int, block_size: int) -> None:
    random = Random(seed)  # noqa: S311 - drawn the same way every time
    twins = Twins(CacheConfig(random.choice((6, 12, 40)), block_size, num_host_blocks=random.choice((0, 8))))
    answers = [[1]]
    for step in range(150):
        if random.random() < 0.2:
            prompt = [*random.choice(answers)[: random.randint(1, 40)], random.randint(1, 2)]
            request = Request(f"r{step}", prompt, random.randint(1, 40), n=random.choice((1, 1, 2)))
            twins.do(lambda scheduler, request=request: scheduler.add(request, now=0.0))
        plans = twins.plans()
        live = sorted(twins.both[0]._live)
        if live and random.random() < 0.05:
            name = random.choice(live)
            twins.do(lambda scheduler, name=name: scheduler.abort(name, 0.0))
        if random.random() < 0.1:
            for scheduler, plan in zip(twins.both, plans, strict=True):
                scheduler.fail(plan, 0.0)
        else:
            # Many different ones: a duplicate is named if what it equals was evicted while it waited, and only then.
            tokens = [random.randint(1, 2**20) for _ in plans[0].sampling_rows]
            events: list[StepEvents] = [
                scheduler.update(plan, tokens, 0.0) for scheduler, plan in zip(twins.both, plans, strict=True)
            ]
            answers += [[*s.request.prompt, *s.output_token_ids.tolist()] for s, _ in events[0].finished]
        twins.do(lambda scheduler: scheduler.check_invariants())
        if random.random() < 0.1:  # Seldom: to look at the state names all that waits.
            twins.check_state()
    twins.check_state()


def test_a_step_of_decodes_only_lets_names_wait_and_a_lookup_finds_them_all() -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=16, block_size=4))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=32, max_num_running=6), manager)
    scheduler.add(Request("a", [1, 2, 3], 9), now=0.0)
    for token in (4, 5):
        scheduler.update(scheduler.schedule(0.0), [token], 0.0)
    assert len(manager.memory.cache) == 0
    assert manager.lookup([1, 2, 3, 4, 9]).num_tokens == 4
    assert len(manager.memory.cache) == 1
