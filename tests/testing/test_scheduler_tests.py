"""Our own scheduler passes the tests that users run against theirs, with every policy."""

from __future__ import annotations

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Cheaper, EventSink, LowestPriority, Priority, Scheduler, SchedulerConfig, Swap
from pagedkv.testing.scheduler_tests import SchedulerTests


class TestRecompute(SchedulerTests):
    def make_scheduler(self, config: SchedulerConfig, cache_config: CacheConfig, sink: EventSink) -> Scheduler:
        return Scheduler(config, KVCacheManager(cache_config), sink=sink)


class TestSwap(SchedulerTests):
    def make_scheduler(self, config: SchedulerConfig, cache_config: CacheConfig, sink: EventSink) -> Scheduler:
        return Scheduler(config, KVCacheManager(cache_config), preemption=Swap(), sink=sink)


class TestByPriority(SchedulerTests):
    def make_scheduler(self, config: SchedulerConfig, cache_config: CacheConfig, sink: EventSink) -> Scheduler:
        manager = KVCacheManager(cache_config)
        policies = {"policy": Priority(), "victim": LowestPriority(), "preemption": Cheaper(1.0, 3.0)}
        return Scheduler(config, manager, sink=sink, **policies)
