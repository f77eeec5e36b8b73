"""Who gets a seat, and how many tokens with it; what admission does where its own counting was wrong."""

from __future__ import annotations

import pytest
from small_scheduler import Events

from pagedkv import CacheConfig, InvariantViolation, KVCacheManager, SimulatedPrompt, UnknownIdError
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler import Cheaper, PreemptionMode, Recompute, Request, Scheduler, SchedulerConfig, Swap


def make_scheduler(
    *, num_blocks: int = 8, budget: int = 16, seats: int = 4, host: int = 0, sink=None, **config
) -> Scheduler:
    """Blocks of two tokens."""
    manager = KVCacheManager(CacheConfig(num_blocks, 2, host))
    preemption = Swap() if host else Recompute()
    return Scheduler(SchedulerConfig(budget, seats, watermark=0.0, **config), manager, preemption=preemption, sink=sink)


def step(scheduler: Scheduler):
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1] * len(plan.sampling_rows), 0.0)
    return plan


def planned(plan) -> dict[str, int]:
    """Tokens of each request that begins or comes back in this plan."""
    tokens = dict(zip(plan.rows.tolist(), plan.num_tokens.tolist(), strict=True))
    return {seat.request_id: tokens[seat.row] for seat in plan.admitted}


@pytest.fixture
def swapped() -> Scheduler:
    """Four blocks: `old` holds all of them, `young` with its one block of two tokens was moved to the host."""
    scheduler = make_scheduler(num_blocks=4, host=4)
    scheduler.add(Request("old", [1, 2, 3, 4, 5], 4), 0.0)
    scheduler.add(Request("young", [6], 4), 0.0)
    step(scheduler)
    step(scheduler)  # Tokens 6 of old and 2 of young fill their blocks.
    plan = step(scheduler)
    assert len(plan.swaps_out) == 1
    return scheduler


def test_without_chunks_a_prompt_is_admitted_if_the_rest_beyond_its_hit_fits_the_budget() -> None:
    scheduler = make_scheduler(budget=6, chunked_prefill=False)
    scheduler.add(Request("first", [1, 2, 3, 4], 1), 0.0)
    step(scheduler)
    scheduler.add(Request("tiny", [9], 1), 0.0)
    scheduler.add(Request("longer", [1, 2, 3, 4, 5, 6], 1), 0.0)  # Six known, five of budget, four of them cached.
    plan = scheduler.schedule(0.0)

    assert planned(plan) == {"tiny": 1, "longer": 2}


def test_without_chunks_a_prompt_that_exceeds_the_rest_of_the_budget_by_one_token_waits() -> None:
    scheduler = make_scheduler(budget=6, chunked_prefill=False)
    scheduler.add(Request("one", [9], 1), 0.0)
    scheduler.add(Request("six", [1, 2, 3, 4, 5, 6], 1), 0.0)
    assert planned(scheduler.schedule(0.0)) == {"one": 1}


def test_without_chunks_a_prompt_that_fits_the_rest_of_the_budget_exactly_is_admitted() -> None:
    scheduler = make_scheduler(budget=6, chunked_prefill=False)
    scheduler.add(Request("one", [9], 1), 0.0)
    scheduler.add(Request("five", [1, 2, 3, 4, 5], 1), 0.0)
    assert planned(scheduler.schedule(0.0)) == {"one": 1, "five": 5}


def test_without_chunks_a_prompt_that_reads_no_cache_is_admitted_only_whole() -> None:
    scheduler = make_scheduler(budget=6, chunked_prefill=False)
    scheduler.add(Request("warm", [1, 2, 3, 4, 5, 6], 1), 0.0)
    step(scheduler)
    scheduler.add(Request("a", [11, 12], 4), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 4, 5], 2, reads_cache=False), 0.0)

    assert planned(step(scheduler)) == {"a": 2}  # "b" has five tokens to compute, and four are left.
    assert planned(step(scheduler)) == {"b": 5}


def test_a_swapped_request_that_does_not_fit_waits_on_the_host(swapped: Scheduler) -> None:
    plan = step(swapped)

    assert (plan.num_rows, len(plan.swaps_in), swapped.num_waiting) == (1, 0, 1)
    assert swapped.manager.memory.host_pool.num_used == 1
    swapped.check_invariants()


def test_blocks_that_are_not_there_when_they_are_taken_are_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2, 3], 1), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(RowMemory, "try_append_run", lambda *_: None)
        with pytest.raises(InvariantViolation, match="I11: admission of 'a' counted blocks that are not there"):
            scheduler.schedule(0.0)

    scheduler.check_invariants()
    assert scheduler.outputs("a")[0].tolist() == []
    assert planned(scheduler.schedule(0.0)) == {"a": 3}


def test_blocks_that_are_not_there_for_a_swap_in_are_our_bug(
    swapped: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped.abort("old", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(RowMemory, "try_swap_in", lambda *_: None)
        with pytest.raises(InvariantViolation, match="I11: swap in of 'young' counted blocks that are not there"):
            swapped.schedule(0.0)

    swapped.check_invariants()
    plan = swapped.schedule(0.0)
    assert (planned(plan), len(plan.swaps_in)) == ({"young": 1}, 1)


def test_outputs_of_a_request_that_is_not_live_are_refused() -> None:
    with pytest.raises(UnknownIdError, match="no live request 'gone'"):
        make_scheduler().outputs("gone")
    with pytest.raises(UnknownIdError, match=r"no live request \[1\]"):
        make_scheduler().outputs([1])


def test_hits_of_one_that_does_not_fit_are_counted_and_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(num_blocks=8, budget=4)
    scheduler.add(Request("warm", [1, 2, 3, 4, 5], 9), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.add(Request("large", [1, 2, 3, 4, *range(20, 32)], 1), 0.0)
    scheduler.add(Request("long", list(range(40, 45)), 1), 0.0)
    listed: list[int] = []
    hit_blocks = RowMemory.hit_blocks
    monkeypatch.setattr(RowMemory, "hit_blocks", lambda *args: listed.append(args[2]) or hit_blocks(*args))

    assert planned(step(scheduler)) == {"long": 3}
    assert listed == [0]  # The long one's, not those of the large one before it.


def test_without_chunks_hits_of_one_that_lacks_tokens_are_counted_and_not_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(num_blocks=40, budget=8, chunked_prefill=False)
    scheduler.add(Request("warm", [1, 2, 3], 4), 0.0)
    step(scheduler)
    scheduler.add(Request("a", [9] * 5, 1), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 4, 5, 6], 1), 0.0)
    listed: list[int] = []
    hit_blocks = RowMemory.hit_blocks
    monkeypatch.setattr(RowMemory, "hit_blocks", lambda *args: listed.append(args[2]) or hit_blocks(*args))

    assert planned(step(scheduler)) == {"a": 5}
    assert listed == [0]


# Passing one that does not fit


def test_one_with_more_samples_than_there_are_seats_left_lets_only_so_many_pass() -> None:
    scheduler = make_scheduler(num_blocks=40, seats=4, max_bypasses=2)
    scheduler.add(Request("runs", [1], 9), 0.0)
    step(scheduler)
    scheduler.add(Request("four", [2], 1, n=4), 0.0)
    for token in (3, 4, 5):
        scheduler.add(Request(str(token), [token], 1), 0.0)

    assert [planned(step(scheduler)) for _ in range(3)] == [{"3": 1, "4": 1}, {}, {}]


def test_where_every_seat_is_taken_only_the_first_in_line_is_told() -> None:
    sink = Events()
    scheduler = make_scheduler(seats=1, sink=sink)
    for name in "abc":
        scheduler.add(Request(name, [ord(name)], 9), 0.0)
    step(scheduler)

    assert [event.request_id for event in sink.named("Deferred")] == ["b"]


def test_without_chunks_a_prompt_that_lacks_what_decodes_take_lets_only_so_many_pass() -> None:
    scheduler = make_scheduler(num_blocks=40, budget=6, chunked_prefill=False, max_bypasses=1)
    scheduler.add(Request("runs", [1], 3), 0.0)
    step(scheduler)
    scheduler.add(Request("six", [2] * 6, 1), 0.0)
    for token in (3, 4):
        scheduler.add(Request(str(token), [token], 1), 0.0)

    assert [planned(step(scheduler)) for _ in range(4)] == [{"3": 1}, {}, {"six": 6}, {"4": 1}]


def test_without_chunks_nobody_passes_a_prompt_that_the_next_step_has_room_for() -> None:
    scheduler = make_scheduler(num_blocks=40, budget=6, chunked_prefill=False)
    for name, num_tokens in (("a", 4), ("b", 5), ("c", 1)):
        scheduler.add(Request(name, [ord(name)] * num_tokens, 1), 0.0)

    assert [planned(step(scheduler)) for _ in range(2)] == [{"a": 4}, {"b": 5, "c": 1}]


def test_two_long_prompts_admitted_in_one_step_are_both_capped() -> None:
    scheduler = make_scheduler(num_blocks=20, long_prefill_tokens=4)
    for name, first in (("a", 100), ("b", 200)):
        scheduler.add(Request(name, list(range(first, first + 10)), 1), 0.0)
    assert planned(scheduler.schedule(0.0)) == {"a": 4, "b": 4}


def test_blocks_are_promised_to_a_prompt_of_which_each_step_computes_one_token() -> None:
    sink = Events()
    scheduler = make_scheduler(num_blocks=10, long_prefill_tokens=1, sink=sink)
    for first in (10, 40, 70):
        scheduler.add(Request(str(first), list(range(first, first + 10)), 1), 0.0)
    while scheduler.has_work:
        step(scheduler)

    assert not sink.named("Preempted")
    assert [event.step for event in sink.named("Admitted")] == [0, 0, 10]


def test_rows_decode_undisturbed_between_two_admissions() -> None:
    scheduler = make_scheduler(admission_interval=3)
    scheduler.add(Request("a", [1], 9), 0.0)
    assert planned(step(scheduler)) == {"a": 1}
    scheduler.add(Request("b", [2], 9), 0.0)
    assert [planned(step(scheduler)) for _ in range(3)] == [{}, {}, {"b": 1}]
    scheduler.add(Request("c", [3], 9), 0.0)
    assert [planned(step(scheduler)) for _ in range(3)] == [{}, {}, {"c": 1}]


def test_requests_left_over_by_the_token_budget_do_not_wait_for_the_next_admission() -> None:
    scheduler = make_scheduler(num_blocks=20, budget=6, admission_interval=100)
    for name in "abc":
        scheduler.add(Request(name, [ord(name)] * 5, 9), 0.0)
    assert [planned(step(scheduler)) for _ in range(3)] == [{"a": 5, "b": 1}, {"c": 1}, {}]


def test_one_that_is_passed_by_does_not_call_off_the_interval() -> None:
    scheduler = make_scheduler(num_blocks=12, admission_interval=4, max_bypasses=100)
    scheduler.add(Request("runs", [1] * 6, 9), 0.0)
    step(scheduler)
    scheduler.add(Request("large", [2] * 20, 1), 0.0)
    admitted = []
    for token in range(10, 18):
        scheduler.add(Request(str(token), [token], 1), 0.0)
        admitted.append(len(planned(step(scheduler))))

    assert admitted == [0, 0, 0, 3, 0, 0, 0, 3]


def test_without_chunks_one_that_lacks_what_decodes_take_does_not_call_off_the_interval() -> None:
    scheduler = make_scheduler(num_blocks=40, budget=6, chunked_prefill=False, admission_interval=3)
    scheduler.add(Request("runs", [1], 6), 0.0)
    step(scheduler)
    scheduler.add(Request("six", [2] * 6, 1), 0.0)
    admitted = []
    for token in range(10, 14):
        scheduler.add(Request(str(token), [token], 1), 0.0)
        admitted.append(len(planned(step(scheduler))))

    assert admitted == [0, 0, 3, 0]


def test_nobody_waits_for_the_next_admission_where_nothing_runs() -> None:
    scheduler = make_scheduler(admission_interval=100)
    scheduler.add(Request("a", [1], 1), 0.0)
    step(scheduler)
    scheduler.add(Request("b", [2], 1), 0.0)
    assert planned(step(scheduler)) == {"b": 1}


def test_steps_that_admit_nobody_do_not_put_off_the_next_admission() -> None:
    scheduler = make_scheduler(admission_interval=3)
    scheduler.add(Request("a", [1], 9), 0.0)
    for _ in range(5):
        step(scheduler)
    scheduler.add(Request("b", [2], 9), 0.0)
    assert planned(step(scheduler)) == {"b": 1}


# What a step that was not carried out leaves


def test_a_row_keeps_what_lies_before_the_block_that_another_row_was_to_fill() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("head", [1, 2], 1), 0.0)
    step(scheduler)
    scheduler.add(Request("a", [1, 2, 3, 4, 5], 1), 0.0)
    scheduler.add(Request("b", [1, 2, 3, 4, 6], 1), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan.starts.tolist() == [2, 4]  # b hits the block that a fills in this step.
    scheduler.fail(plan, 0.0)

    assert scheduler.schedule(0.0).starts.tolist() == [2, 2]


def test_a_sample_whose_swap_in_failed_starts_over_from_what_had_not_left_the_device(swapped: Scheduler) -> None:
    swapped.abort("old", 0.0)
    plan = swapped.schedule(0.0)
    assert (len(plan.swaps_in), plan.starts.tolist()) == (1, [2])
    swapped.fail(plan, 0.0)

    assert swapped.schedule(0.0).starts.tolist() == [0]


def test_a_request_that_lost_its_blocks_still_tells_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(Request("old", [1, 2, 3, 4, 5], 4), 0.0)
    scheduler.add(Request("young", [6], 4), 0.0)
    for _ in range(3):
        step(scheduler)
    assert scheduler.num_waiting == 1
    assert scheduler.outputs("young")[0].tolist() == [1, 1]


# Which mode is cheaper


def test_a_tie_between_the_modes_is_recomputed_and_costs_may_be_nothing() -> None:
    assert Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=1.0).choose(4, 2) is PreemptionMode.RECOMPUTE
    assert Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=1.0).choose(5, 2) is PreemptionMode.SWAP
    assert Cheaper(prefill_s_per_token=1.0, transfer_s_per_block=0.0).choose(1, 2) is PreemptionMode.SWAP
    assert Cheaper(prefill_s_per_token=0.0, transfer_s_per_block=0.0).choose(1, 2) is PreemptionMode.RECOMPUTE


def test_a_request_whose_ids_contradict_those_of_others_is_served_with_a_shorter_hit() -> None:
    scheduler = make_scheduler()
    scheduler.add(Request("a", SimulatedPrompt(7, [1, 2, 3], 2), 1), 0.0)
    scheduler.update(scheduler.schedule(0.0), None, 0.0)
    scheduler.add(Request("b", SimulatedPrompt(7, [1, 9, 3], 2), 1), 0.0)

    plan = scheduler.schedule(0.0)
    scheduler.update(plan, None, 0.0)

    assert (plan.starts.tolist(), plan.num_tokens.tolist()) == ([2], [5])
    assert not scheduler.has_work
    scheduler.check_invariants()
