"""Who loses a seat when blocks run short, and how it comes back."""

from __future__ import annotations

import pytest
from small_scheduler import Events, finish, make_scheduler, request, step

from pagedkv.scheduler import (
    Cheaper,
    LowestPriority,
    PreemptionMode,
    Priority,
    Recompute,
    Request,
    Swap,
)


def test_blocks_run_short_and_the_latest_arrival_is_preempted() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=4, sink=sink)
    scheduler.add(request("a", 7, 9), 0.0)
    scheduler.add(request("b", 7, 9), 0.0)

    finish(scheduler)

    preempted = sink.named("Preempted")
    assert {event.request_id for event in preempted} == {"b"}
    assert (preempted[0].mode, preempted[0].num_computed_tokens) == ("recompute", 8)
    assert (preempted[0].num_used_before, preempted[0].num_used_after) == (4, 2)


def test_under_priorities_the_least_important_is_preempted() -> None:
    sink = Events()
    order = {"policy": Priority(ageing_per_s=0), "victim": LowestPriority()}
    scheduler = make_scheduler(num_blocks=4, sink=sink, **order)
    scheduler.add(request("a", 7, 9, priority=2), 0.0)
    scheduler.add(request("b", 7, 9, priority=1), 0.0)

    finish(scheduler)

    assert {event.request_id for event in sink.named("Preempted")} == {"a"}


def test_an_urgent_request_keeps_its_seat_though_nobody_said_who_is_to_lose_it() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=4, policy=Priority(ageing_per_s=0), sink=sink)
    scheduler.add(request("patient", 7, 9, priority=9), 0.0)
    scheduler.add(request("urgent", 7, 9, priority=0), 1.0)

    finish(scheduler)

    assert {event.request_id for event in sink.named("Preempted")} == {"patient"}


def test_only_as_many_lose_their_seat_as_blocks_are_needed() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=6, sink=sink)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 7, 2), 0.0)

    step(scheduler)
    step(scheduler)

    assert len(sink.named("Preempted")) == 0
    scheduler = make_scheduler(num_blocks=6, sink=sink)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 7, 3), 0.0)
    for _ in range(3):
        step(scheduler)
    assert [event.request_id for event in sink.named("Preempted")] == ["c"]


def test_a_sample_that_came_back_is_not_thrown_out_before_it_fills_a_block() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=8, sink=sink)
    manager = scheduler.manager
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 16), 0.0)
    step(scheduler)
    manager.open("other", [9] * 24)
    manager.append("other", manager.memory.pool.num_free * 4)
    while not sink.named("Preempted"):
        step(scheduler)
    manager.close("other")
    manager.reset_prefix_cache()
    step(scheduler)  # b comes back
    manager.open("other", [8] * 24)
    manager.append("other", manager.memory.pool.num_available * 4)
    while len(sink.named("Preempted")) < 2:
        step(scheduler)

    assert [event.request_id for event in sink.named("Preempted")] == ["b", "a"]


@pytest.mark.parametrize("policy", [Swap(), Recompute()], ids=["swap", "recompute"])
def test_swapping_computes_no_token_twice_and_recomputing_needs_no_host(policy) -> None:
    scheduler = make_scheduler(num_blocks=5, host=8, preemption=policy)
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 9), 0.0)
    num_computed = num_swapped = 0
    while scheduler.has_work:
        plan = step(scheduler)
        num_computed += int(plan.num_tokens.sum())
        num_swapped += len(plan.swaps_out)

    needed = 2 * (7 + 9 - 1)
    assert (num_computed == needed) == isinstance(policy, Swap)
    assert (num_swapped > 0) == isinstance(policy, Swap)
    assert scheduler.manager.memory.host_pool.num_used == 0


def test_a_full_host_pool_means_recompute() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=4, host=1, preemption=Swap(), sink=sink)
    for name in ("a", "b"):
        scheduler.add(request(name, 7, 9), 0.0)

    finish(scheduler)

    assert {event.mode for event in sink.named("Preempted")} == {"recompute"}


def test_the_cheaper_mode_follows_the_two_costs() -> None:
    policy = Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=5.0)

    assert policy.choose(num_computed_tokens=9, num_blocks=1) is PreemptionMode.RECOMPUTE
    assert policy.choose(num_computed_tokens=11, num_blocks=1) is PreemptionMode.SWAP


class Asked(list):
    """A preemption policy that notes what it is asked, and always recomputes."""

    def choose(self, num_tokens: int, num_blocks: int) -> PreemptionMode:
        self.append((num_tokens, num_blocks))
        return PreemptionMode.RECOMPUTE


@pytest.mark.parametrize(("reads_cache", "num_tokens"), [(True, 4), (False, 20)])
def test_what_siblings_hold_need_not_be_computed_again(reads_cache, num_tokens) -> None:
    policy = Asked()
    scheduler = make_scheduler(num_blocks=7, preemption=policy)
    scheduler.add(request("twins", 16, 8, n=2, reads_cache=reads_cache), 0.0)
    while not policy:
        step(scheduler)

    # Both hold the four blocks of the prompt and have filled one of their own; both need another, one is left.
    assert policy == [(num_tokens, 5)]


def test_what_only_the_victim_holds_counts_whole_and_so_does_what_has_no_name() -> None:
    policy = Asked()
    scheduler = make_scheduler(num_blocks=5, preemption=policy)
    scheduler.add(request("a", 6, 9), 0.0)
    scheduler.add(Request("b", [*request("a", 4, 1).prompt, 9, 9, 9, 9], 9), 0.0)
    while not policy:
        step(scheduler)

    assert policy == [(12 - 4, 3)]  # The first block is a's, too.


def test_siblings_whose_prompt_the_others_hold_are_not_moved_to_the_host() -> None:
    sink = Events()
    policy = Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=1.0)
    scheduler = make_scheduler(num_blocks=14, seats=4, host=40, preemption=policy, sink=sink)
    scheduler.add(request("four", 40, 8, n=4), 0.0)
    finish(scheduler)

    assert {event.mode for event in sink.named("Preempted")} == {"recompute"}
