"""`SchedulerTests`: the promises of a scheduler as a test class to subclass."""

from __future__ import annotations

import pytest

from pagedkv.config import CacheConfig
from pagedkv.errors import InvariantViolation
from pagedkv.scheduler import EventSink, Scheduler, SchedulerConfig
from pagedkv.testing.scheduler_driver import Drive, Scenario
from pagedkv.testing.scheduler_scenarios import scheduler_scenarios

__all__ = ["SchedulerTests"]

SCENARIOS = {scenario.name: scenario for scenario in scheduler_scenarios()}


class SaltedId(str):
    """An id with a hash of its own: sets and maps that are ordered by hash are ordered otherwise with each salt."""

    __slots__ = ("salt",)
    salt: int

    def __hash__(self) -> int:
        return hash((self.salt, str(self)))

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented


def _salted(salt: int, request_id: str) -> str:
    renamed = SaltedId(request_id)
    renamed.salt = salt
    return renamed


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
class SchedulerTests:
    """Subclass it and supply `make_scheduler`; each test holds the scheduler to one invariant, and names it on failure.

    class TestMine(SchedulerTests):
        def make_scheduler(self, config, cache_config, sink):
            return Scheduler(config, KVCacheManager(cache_config), sink=sink)

    The scheduler under test is used as `pagedkv.scheduler.Scheduler` is: `add`, `abort`, `schedule`, `update`, `has_work`,
    `num_running`, `num_waiting`, `block_tables` and `manager.statistics()`; plans and events are those of pagedkv. Plans
    are carried out by a model whose every token depends on the whole prefix, so a wrong slot shows in the answers.
    """

    max_preemptions: int | None = None
    """How often the scheduler may preempt one sample (I13); None: as often as `config.max_preemptions` says."""

    def make_scheduler(self, config: SchedulerConfig, cache_config: CacheConfig, sink: EventSink) -> Scheduler:
        """Make a scheduler with these limits and an empty memory, that tells `sink` what it decides."""
        raise NotImplementedError("subclass SchedulerTests and supply make_scheduler")

    def drive(self, scenario: Scenario, enforced: str, salt: int = 0) -> str:
        """Run a scenario and hold the scheduler to one invariant; returns the event log."""
        drive = Drive(
            self.make_scheduler,
            scenario,
            enforced,
            rename=lambda request_id: _salted(salt, request_id),
            max_preemptions=self.max_preemptions,
        )
        return drive.run()

    def test_nothing_is_left_when_everybody_is_through_i10(self, scenario: Scenario) -> None:
        """No block, no sequence, no record."""
        self.drive(scenario, "I10")

    def test_somebody_always_advances_i11(self, scenario: Scenario) -> None:
        """Everybody gets through, and no preemption is for nothing."""
        self.drive(scenario, "I11")

    def test_exactly_what_can_never_fit_is_refused_i12(self, scenario: Scenario) -> None:
        """Refused when it is added; what just fits is not."""
        self.drive(scenario, "I12")

    def test_nobody_is_preempted_or_passed_without_end_i13(self, scenario: Scenario) -> None:
        """At most `max_preemptions` a sample; at most `config.max_bypasses` later requests go before an earlier one."""
        self.drive(scenario, "I13")

    def test_the_event_log_is_the_same_whatever_strings_hash_to_i14(self, scenario: Scenario) -> None:
        """Byte for byte, for three hashes of the same ids."""
        first, second, third = (self.drive(scenario, "I14", salt) for salt in (0, 1, 2))
        if not first == second == third:
            raise InvariantViolation(
                "I14", f"scenario {scenario.name!r}: the event log depends on hashes, or on chance"
            )

    def test_limits_hold_and_every_token_is_computed_once_i15(self, scenario: Scenario) -> None:
        """Token budget, seats, and answers that equal those of a run without any cache."""
        self.drive(scenario, "I15")

    def test_figures_equal_a_recount_of_the_event_log_i16(self, scenario: Scenario) -> None:
        """Counters, hits and utilisation."""
        self.drive(scenario, "I16")
