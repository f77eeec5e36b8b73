"""What the scheduler refuses: requests that can never fit, wrong values, times that are none."""

from __future__ import annotations

import re

import pytest
from small_scheduler import Events, finish, make_scheduler, request

from pagedkv import (
    CacheConfig,
    ConfigError,
    DuplicateIdError,
    InvalidArgumentError,
    KVCacheManager,
)
from pagedkv.scheduler import (
    Cheaper,
    LatestArrival,
    Priority,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    Swap,
)


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic() -> None:
    sink = Events()
    scheduler = make_scheduler(sink=sink)

    with pytest.raises(RequestTooLargeError, match="30 prompt \\+ 4 new tokens need 9 blocks of 4, the pool has 8"):
        scheduler.add(request("a", 30, 4), 0.0)

    assert not scheduler.has_work
    assert [event.request_id for event in sink.named("Refused")] == ["a"]


def test_a_request_that_fills_the_pool_exactly_runs() -> None:
    scheduler = make_scheduler()
    # 29 + 4 - 1 = 32 tokens: the K/V of the last token is never computed.
    scheduler.add(request("a", 29, 4), 0.0)

    assert finish(scheduler) == 4


def test_more_samples_than_seats_are_refused() -> None:
    with pytest.raises(RequestTooLargeError, match="5 samples need as many seats, there are 4"):
        make_scheduler().add(request("a", 3, 4, n=5), 0.0)


def test_without_chunked_prefill_a_request_longer_than_the_budget_is_refused() -> None:
    scheduler = make_scheduler(budget=8, config={"chunked_prefill": False})

    with pytest.raises(RequestTooLargeError, match="up to 9 tokens must be computed in one step"):
        scheduler.add(request("a", 6, 4), 0.0)


def test_a_duplicate_id_changes_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 4), 0.0)

    with pytest.raises(DuplicateIdError, match="'a' is live already"):
        scheduler.add(request("a", 5, 1), 0.0)

    assert scheduler.num_waiting == 1
    finish(scheduler)
    scheduler.add(request("a", 3, 4), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_id": ""},
        {"request_id": 7},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [2**31]},
        {"prompt": [1.5]},
        {"prompt": [float("nan")]},
        {"max_new_tokens": -1},
        {"max_new_tokens": True},
        {"max_new_tokens": 2**40},
        {"n": 0},
        {"n": 10**6},
        {"priority": float("nan")},
        {"salt": b"x" * 65},
        {"salt": "text"},
        {"adapter": 3},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": list(range(2000))},
    ],
    ids=str,
)
def test_a_wrong_request_is_one_typed_error_and_changes_nothing(wrong) -> None:
    scheduler = make_scheduler()
    fields = {"request_id": "a", "prompt": [1, 2], "max_new_tokens": 1, **wrong}

    with pytest.raises(InvalidArgumentError):
        scheduler.add(Request(**fields), 0.0)

    assert not scheduler.has_work


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": 10, "max_num_running": 11},
        {"max_num_running": -1},
        {"watermark": 1.0},
        {"watermark": float("nan")},
        {"long_prefill_tokens": 0},
        {"long_prefill_tokens": 9, "chunked_prefill": False},
        {"max_bypasses": -1},
        {"admission_interval": 0},
        {"max_num_running": 2.0},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        SchedulerConfig(**wrong)


@pytest.mark.parametrize("now", [float("nan"), float("inf"), "0", None], ids=str)
def test_a_time_that_is_no_number_is_refused_and_changes_nothing(now) -> None:
    scheduler = make_scheduler(policy=Priority())
    scheduler.add(request("a", 3, 4), 0.0)
    plan = scheduler.schedule(0.0)

    for call in (
        lambda: scheduler.add(request("b", 3, 4), now),
        lambda: scheduler.abort("a", now),
        lambda: scheduler.update(plan, [1], now),
        lambda: scheduler.fail(plan, now),
        lambda: scheduler.schedule(now),
    ):
        with pytest.raises(InvalidArgumentError, match="now must be a finite number"):
            call()

    assert (scheduler.in_flight, scheduler.num_running, scheduler.num_waiting) == (plan, 1, 0)
    scheduler.check_invariants()
    scheduler.update(plan, [1], 0.0)


@pytest.mark.parametrize("preemption", [Swap(), Cheaper(1.0, 1.0)])
def test_swapping_without_host_blocks_is_refused(preemption) -> None:
    name = type(preemption).__name__
    with pytest.raises(ConfigError, match=f"preemption {name} has no host blocks to move to: give num_host_blocks"):
        make_scheduler(host=0, preemption=preemption)

    make_scheduler(host=1, preemption=preemption)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policy": "priority"}, r"policy must be an object such as Priority\(\), found 'priority'"),
        (
            {"victim": LatestArrival},
            r"victim must be an object such as LowestPriority\(\), found the class LatestArrival",
        ),
        ({"preemption": "swap"}, r"preemption must be an object such as Swap\(\), found 'swap'"),
        (
            {"sink": print},
            r"sink must be an object such as EventLog\(file\), found one of type builtin_function_or_method",
        ),
        ({"config": {"max_num_running": 4}}, "config must be a SchedulerConfig, found one of type dict"),
        (
            {"manager": None},
            "manager must be a KVCacheManager, found one of type NoneType",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_name_or_a_class_in_place_of_an_object_is_refused_at_once(wrong, message: str) -> None:
    parts = {"config": SchedulerConfig(8, 4), "manager": KVCacheManager(CacheConfig(4))} | wrong
    with pytest.raises(ConfigError, match=message):
        Scheduler(parts.pop("config"), parts.pop("manager"), **parts)


def test_a_budget_below_the_default_number_of_seats_is_refused_with_what_to_change() -> None:
    message = (
        "max_num_running 256 exceeds max_num_batched_tokens 128, and every running request needs one token a step: "
        "pass max_num_running of at most 128 (the default is 256), or a larger max_num_batched_tokens"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        SchedulerConfig(max_num_batched_tokens=128)
