"""What is left of a sample when it has ended: its tokens, and how many it has."""

from __future__ import annotations

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.scheduler import Request, SampleState, Scheduler, SchedulerConfig


def test_a_finished_sample_holds_its_new_tokens_and_its_length() -> None:
    scheduler = Scheduler(SchedulerConfig(64, 4), KVCacheManager(CacheConfig(16, 2)))
    scheduler.add(Request("a", [1, 2], 9, stop_token_ids=(8,)), 0.0)
    for token in (6, 7, 8):
        events = scheduler.update(scheduler.schedule(0.0), [token], 0.0)
    sample, reason = events.finished[0]

    assert (reason, sample.state, sample.row) == ("stop", SampleState.FINISHED, -1)
    assert sample.output_token_ids.tolist() == [6, 7, 8]
    assert sample.num_known == 5
    assert "a" not in scheduler


def test_a_simulated_sample_that_finished_has_its_length() -> None:
    scheduler = Scheduler(SchedulerConfig(64, 4), KVCacheManager(CacheConfig(16, 2)))
    scheduler.add(Request("a", SimulatedPrompt(3), 2), 0.0)
    scheduler.update(scheduler.schedule(0.0), None, 0.0)
    events = scheduler.update(scheduler.schedule(0.0), None, 0.0)

    assert [sample.num_known for sample, _ in events.finished] == [5]
