"""What a client's share lets in, who stands back, and in which order those get in."""

from __future__ import annotations

import io

import pytest

from pagedkv import CacheConfig, ConfigError, InvariantViolation, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import (
    EventLog,
    QueueFullError,
    Recorder,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    replay_recording,
)


class Events(list):
    """A sink that keeps the events."""

    def emit(self, event) -> None:
        self.append(event)

    def told(self, name: str) -> list[tuple[str, str]]:
        return [(event.request_id, getattr(event, "reason", "")) for event in self if type(event).__name__ == name]


def make(share: float | None = 0.5, *, sink=None, seats: int = 4, **limits) -> Scheduler:
    """8 blocks of 4: half of them are two requests of 5 + 4 tokens, or one that is twice as long."""
    config = SchedulerConfig(64, seats, watermark=0, client_share=share, **limits)
    return Scheduler(config, KVCacheManager(CacheConfig(8, 4)), sink=sink)


def small(name: str, client: str, **more) -> Request:
    return Request(name, SimulatedPrompt(5), 4, client=client, **more)


def step(scheduler: Scheduler) -> list[str]:
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, None, 0.0)
    scheduler.check_invariants()
    return [seat.request_id for seat in plan.admitted]


def test_what_exceeds_a_share_stands_back_until_another_of_its_client_is_over() -> None:
    events = Events()
    scheduler = make(sink=events)
    for name in ("a1", "a2", "a3", "a4"):
        scheduler.add(small(name, "a"), 0.0)
    scheduler.add(small("b1", "b"), 0.0)

    admitted = [step(scheduler) for _ in range(8)]

    assert events.told("Deferred") == [("a3", "its client's share is taken"), ("a4", "its client's share is taken")]
    assert admitted == [["a1", "a2", "b1"], [], [], [], ["a3", "a4"], [], [], []]
    assert not scheduler.has_work


def test_whoever_entered_later_stands_behind_those_who_came_meanwhile() -> None:
    scheduler = make(seats=2)  # One seat each.
    for name, client in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
        scheduler.add(small(name, client), 0.0)

    order = [name for _ in range(12) for name in step(scheduler)]

    assert order == ["a1", "b1", "c1", "a2", "b2"]


def test_one_share_of_49_is_all_that_a_49th_holds() -> None:
    assert 49 * (1 / 49) < 1  # As floats have it.
    config = SchedulerConfig(64, 49, watermark=0, client_share=1 / 49, max_num_waiting=98)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(3 * 49, 4)))

    scheduler.add(Request("a", SimulatedPrompt(12), 1, client="a"), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(12), 1, client="a"), 0.0)
    with pytest.raises(QueueFullError, match="2 requests of its client are here"):
        scheduler.add(Request("c", SimulatedPrompt(12), 1, client="a"), 0.0)
    with pytest.raises(RequestTooLargeError, match="a client's share is 1 and 3"):
        scheduler.add(Request("d", SimulatedPrompt(13), 1, client="d"), 0.0)


def test_the_smallest_share_is_one_seat() -> None:
    config = SchedulerConfig(64, 4, watermark=0, client_share=0.1)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(20, 4)))
    scheduler.add(Request("a", SimulatedPrompt(5), 4, client="a"), 0.0)

    assert step(scheduler) == ["a"]


def test_a_request_that_exceeds_a_share_alone_is_refused_with_the_arithmetic() -> None:
    scheduler = make()

    with pytest.raises(RequestTooLargeError, match="needs 1 seats and up to 5 blocks, a client's share is 2 and 4"):
        scheduler.add(Request("a", SimulatedPrompt(17), 1, client="a"), 0.0)
    with pytest.raises(RequestTooLargeError, match="needs 3 seats and up to 6 blocks"):
        scheduler.add(small("a", "a", n=3), 0.0)
    assert not scheduler.has_work


def test_one_that_stands_back_may_be_aborted_and_nobody_enters_for_it() -> None:
    scheduler = make()
    for name in ("a1", "a2", "a3", "a4"):
        scheduler.add(small(name, "a"), 0.0)

    scheduler.abort("a3", 0.0)

    assert scheduler.num_waiting == 3
    scheduler.check_invariants()
    scheduler.abort("a1", 0.0)
    scheduler.check_invariants()
    assert step(scheduler) == ["a2", "a4"]


def test_one_that_comes_while_a_step_is_in_flight_stands_back_in_that_step() -> None:
    events = Events()
    scheduler = make(sink=events)
    scheduler.add(Request("a1", SimulatedPrompt(13), 1, client="a"), 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.add(small("a2", "a"), 0.0)
    scheduler.update(plan, None, 0.0)

    assert [event.step for event in events if event.request_id == "a2" and hasattr(event, "step")] == [plan.step]


def test_requests_without_a_client_are_one_clients() -> None:
    scheduler = make()
    for name in ("x", "y", "z"):
        scheduler.add(Request(name, SimulatedPrompt(5), 4), 0.0)

    assert step(scheduler) == ["x", "y"]


def test_samples_hold_their_share_until_the_last_of_them_is_over() -> None:
    scheduler = make()
    scheduler.add(small("two", "a", n=2), 0.0)
    scheduler.add(small("next", "a"), 0.0)

    admitted = [step(scheduler) for _ in range(5)]

    assert admitted == [["two", "two"], [], [], [], ["next"]]


def test_a_watermark_is_no_part_of_the_shares() -> None:
    config = SchedulerConfig(64, 4, watermark=0.25, client_share=0.5)
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(8, 4)))

    with pytest.raises(RequestTooLargeError, match="a client's share is 2 and 3"):
        scheduler.add(Request("a", SimulatedPrompt(13), 1, client="a"), 0.0)


def test_without_a_share_as_many_may_wait_as_the_limit_says() -> None:
    events = Events()
    scheduler = make(None, sink=events, max_num_waiting=2)
    scheduler.add(small("a", "a"), 0.0)
    scheduler.add(small("b", "b"), 0.0)

    with pytest.raises(QueueFullError, match="'c' may not wait: 2 samples wait, no more may"):
        scheduler.add(small("c", "c"), 0.0)

    assert events.told("Refused") == [("c", "2 samples wait, no more may")]
    step(scheduler)
    scheduler.add(small("c", "c"), 0.0)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), "half", True])
def test_a_share_is_a_part(share) -> None:
    if share is True:
        assert SchedulerConfig(client_share=True).client_share == 1
        return
    with pytest.raises(ConfigError, match="client_share must be None or a number above 0, at most 1"):
        SchedulerConfig(client_share=share)


def test_a_recount_finds_what_was_counted_wrongly() -> None:
    scheduler = make()
    for name in ("a1", "a2", "a3"):
        scheduler.add(small(name, "a"), 0.0)
    scheduler._shares._entered["a"] = (2, 2, 3)

    with pytest.raises(InvariantViolation, match="I15: clients have entered"):
        scheduler.check_invariants()


def test_a_recount_finds_who_stands_back_for_nobody_knows_what() -> None:
    scheduler = make()
    for name in ("a1", "a2", "a3"):
        scheduler.add(small(name, "a"), 0.0)
    scheduler._shares.num_standing = 0

    with pytest.raises(InvariantViolation, match=r"I15.*1 stand back"):
        scheduler.check_invariants()


def test_a_recount_finds_a_client_with_more_than_its_share() -> None:
    scheduler = make()
    for name in ("a1", "a2"):
        scheduler.add(small(name, "a"), 0.0)
    scheduler._shares.max_blocks = 3

    with pytest.raises(InvariantViolation, match="I15: client 'a' has 2 seats and 4 blocks"):
        scheduler.check_invariants()


def test_shares_are_recorded_and_replayed() -> None:
    recording, log, again = io.StringIO(), io.StringIO(), io.StringIO()
    scheduler = Recorder(make(sink=EventLog(log)), recording)
    for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
        scheduler.add(small(name, client), 0.0)
    while scheduler.has_work:
        scheduler.update(scheduler.schedule(0.0), None, 0.0)

    list(replay_recording(recording.getvalue().splitlines(), EventLog(again)))

    assert again.getvalue() == log.getvalue()
    assert "its client's share is taken" in log.getvalue()
