"""Known-bad schedulers: pagedkv's own with one bug each, and the invariant that it breaks. The tests must catch them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int32s
from pagedkv.config import CacheConfig
from pagedkv.manager import KVCacheManager
from pagedkv.scheduler import (
    Event,
    EventSink,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    StepEvents,
    StepOutcome,
    StepPlan,
    Swap,
)
from pagedkv.scheduler.admission import Admission
from pagedkv.scheduler.events import Admitted, Finished
from pagedkv.statistics import MemoryStatistics, PrefixCounters

__all__ = ["KNOWN_BAD_SCHEDULERS", "KnownBadScheduler"]

Drafts = Mapping[int, Sequence[int] | Int32s]
Outcome = StepOutcome | Sequence[int] | Int32s


class KnownBadScheduler(NamedTuple):
    """The invariant that a bug breaks, and the factory of schedulers that have it."""

    invariant: str
    make: Callable[[SchedulerConfig, CacheConfig, EventSink], Scheduler]


class LeavesAbortedRunning(Scheduler):
    """An abort of a running request frees its seat, but not its blocks."""

    def abort(self, request_id: str, now: float) -> None:
        """Abort, with one hold too many."""
        for sample in self._live.get(request_id, []):
            if sample.row >= 0 and sample.row not in self._memory.host_blocks:
                self._memory.pool.acquire(self._memory.sequences.blocks(sample.row)[:1])
        super().abort(request_id, now)


class KeepsHostBlocks(Scheduler):
    """Whoever is swapped out leaves one block of the host pool behind."""

    def schedule(self, now: float, drafts: Drafts | None = None) -> StepPlan:
        """Plan, and take a host block for each swap."""
        plan = super().schedule(now, drafts)
        if len(plan.swaps_out):
            self._memory.host_pool.try_allocate(1)
        return plan


class FencesVictims(Scheduler):
    """The blocks of a preempted request are held back until the step is over, so nobody gains them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        preempt = self._shortage.preempt
        self._shortage = _FencingShortage(self._shortage, self._memory, preempt)  # type: ignore[assignment]
        self._planner._shortage = self._planner._catch_up._shortage = self._shortage

    def update(self, plan: StepPlan, outcome: Outcome | None, now: float) -> StepEvents:
        """Let go of the fenced blocks, too late."""
        self._shortage.release()  # type: ignore[attr-defined]
        return super().update(plan, outcome, now)


class _FencingShortage:
    """A Shortage that takes what each victim gave back."""

    def __init__(self, shortage: Any, memory: Any, preempt: Callable[..., int]) -> None:
        self._inner, self._memory, self._preempt = shortage, memory, preempt
        self._fenced: list[Any] = []

    def preempt(self, num_needed: int, *, now: float, step: int) -> int:
        """Preempt, then take the blocks before anybody else can."""
        before = self._memory.pool.num_available
        row = self._preempt(num_needed, now=now, step=step)
        taken = self._memory.pool.try_allocate(self._memory.pool.num_available - before)
        if taken is not None:
            self._fenced.append(taken)
        event = self._inner._events.pop()
        self._inner._events.append(event._replace(num_used_after=self._memory.pool.num_used))
        return row

    def release(self) -> None:
        """Give the fenced blocks back."""
        for blocks in self._fenced:
            self._memory.pool.release(blocks)
        self._fenced.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class WaitsForRoom(Scheduler):
    """Half of the blocks must stay free at every admission, even if nobody runs: large requests wait for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._admission.__class__ = _RoomyAdmission


class _RoomyAdmission(Admission):
    """An admission with a watermark of one half, always."""

    __slots__ = ()

    def _fits(self, num_blocks: int) -> bool:
        pool = self._memory.pool
        return num_blocks + pool.num_blocks // 2 <= pool.num_available


class DropsWhatNeverFits(Scheduler):
    """A request that can never fit is swallowed: its client waits for ever."""

    def add(self, request: Request, now: float) -> None:
        """Add, silently or not at all."""
        try:
            super().add(request, now)
        except RequestTooLargeError:
            return


class ForgetsSalts(Scheduler):
    """All requests are taken for one tenant's."""

    def add(self, request: Request, now: float) -> None:
        """Add the same request without its salt."""
        super().add(dataclasses.replace(request, salt=b""), now)


class RefusesExactFit(Scheduler):
    """A request that needs all the blocks is refused."""

    def add(self, request: Request, now: float) -> None:
        """Refuse one token too early."""
        num_slots = len(np.asarray(request.prompt)) + max(request.max_new_tokens, 1)
        if num_slots > self._memory.pool.num_blocks * self._memory.block_size:
            raise RequestTooLargeError(f"{num_slots} slots are too many")
        super().add(request, now)


class LastComeFirstServed:
    """Whoever came last goes first."""

    def __init__(self) -> None:
        self._num = 0

    def rank(self, request: Request, now: float) -> float:  # noqa: ARG002 - the protocol's signature
        """Lower ranks for later requests."""
        self._num += 1
        return -float(self._num)


class PreemptsAgainAndAgain(Scheduler):
    """In every step the last one loses the seat for no reason, however recently it came back."""

    def schedule(self, now: float, drafts: Drafts | None = None) -> StepPlan:
        """Preempt, then plan."""
        if len(self._running) > 1:
            self._running.protected_until[:] = 0
            self._shortage.preempt(0, now=now, step=self._step)
        return super().schedule(now, drafts)


class HashedOrder:
    """Requests are ordered by the hash of their id."""

    def rank(self, request: Request, now: float) -> float:  # noqa: ARG002 - the protocol's signature
        """A rank that is another one in every process."""
        return float(hash(request.request_id) % 1000)


class ComputesTwice(Scheduler):
    """Of a prompt in chunks, the last token of each chunk is computed again with the next."""

    def schedule(self, now: float, drafts: Drafts | None = None) -> StepPlan:
        """Go one token back wherever a prompt is under way."""
        table = self._memory.sequences
        for row in self.running_rows.tolist():
            if (
                1 < table.num_computed[row] < table.num_known[row] - 1
                and table.num_computed[row] % table.block_size > 1
            ):
                table.num_computed[row] -= 1
        return super().schedule(now, drafts)


class SkipsTokens(Scheduler):
    """Of a prompt in chunks, the first token of each later chunk is taken for computed."""

    def schedule(self, now: float, drafts: Drafts | None = None) -> StepPlan:
        """Go one token ahead wherever a prompt is under way."""
        table = self._memory.sequences
        for row in self.running_rows.tolist():
            if table.num_computed[row] < table.num_known[row] - 1 and table.num_computed[row] % table.block_size:
                table.num_computed[row] += 1
        return super().schedule(now, drafts)


class CountsPreemptionsWrongly(Scheduler):
    """What a finished request is said to have gone through is one preemption too many."""

    def _deliver(self) -> None:
        for i, event in enumerate(self._events):
            if isinstance(event, Finished):
                self._events[i] = event._replace(num_preemptions=event.num_preemptions + 1)
        super()._deliver()


class CountsResumedAsNew(Scheduler):
    """Requests that come back after a preemption count as queries of the prefix cache."""

    def _deliver(self) -> None:
        counters = self._memory.counters
        for event in self._events:
            if isinstance(event, Admitted) and event.mode == "recomputed":
                counters.num_queries += 1
        super()._deliver()


class ForgetfulManager(KVCacheManager):
    """Counters start from zero again now and then."""

    num_looks = 0

    def statistics(self) -> MemoryStatistics:
        """Figures, of which those of the prefix cache fall."""
        self.num_looks += 1
        statistics = super().statistics()
        return dataclasses.replace(statistics, prefix=PrefixCounters()) if self.num_looks % 5 == 0 else statistics


class _Renaming:
    """A sink in between, that tells another story."""

    def __init__(self, sink: EventSink, change: Callable[[Event], Event]) -> None:
        self._sink, self._change = sink, change

    def emit(self, event: Event) -> None:
        """Pass on what became of the event."""
        self._sink.emit(self._change(event))


def _boast(event: Event) -> Event:
    """Tell of more hits than there were."""
    return event._replace(num_hit_tokens=event.num_known_tokens) if isinstance(event, Admitted) else event


def _plain(cls: type[Scheduler], **options: Any) -> Callable[[SchedulerConfig, CacheConfig, EventSink], Scheduler]:
    return lambda config, cache, sink: cls(config, KVCacheManager(cache), sink=sink, **options)


def _with_config(**changes: Any) -> Callable[[SchedulerConfig, CacheConfig, EventSink], Scheduler]:
    """A scheduler that takes other limits than it was given: changes are functions of the configuration."""

    def make(config: SchedulerConfig, cache: CacheConfig, sink: EventSink) -> Scheduler:
        changed = {name: change(config) for name, change in changes.items()}
        return Scheduler(dataclasses.replace(config, **changed), KVCacheManager(cache), sink=sink)

    return make


KNOWN_BAD_SCHEDULERS: dict[str, KnownBadScheduler] = {
    "an abort leaves blocks held": KnownBadScheduler("I10", _plain(LeavesAbortedRunning)),
    "a swap leaves host blocks held": KnownBadScheduler("I10", _plain(KeepsHostBlocks, preemption=Swap())),
    "victims are fenced": KnownBadScheduler("I11", _plain(FencesVictims)),
    "large requests wait for room that never comes": KnownBadScheduler("I11", _plain(WaitsForRoom)),
    "what can never fit is swallowed": KnownBadScheduler("I12", _plain(DropsWhatNeverFits)),
    "an exact fit is refused": KnownBadScheduler("I12", _plain(RefusesExactFit)),
    "the last come is served first": KnownBadScheduler("I13", _plain(Scheduler, policy=LastComeFirstServed())),
    "small requests pass large ones for ever": KnownBadScheduler("I13", _with_config(max_bypasses=lambda _: 1000)),
    "the bound on preemptions is not kept": KnownBadScheduler("I13", _with_config(max_preemptions=lambda _: 1000)),
    "seats are lost for no reason": KnownBadScheduler("I13", _plain(PreemptsAgainAndAgain)),
    "the order follows hashes": KnownBadScheduler("I14", _plain(Scheduler, policy=HashedOrder())),
    "the token budget is exceeded": KnownBadScheduler(
        "I15", _with_config(max_num_batched_tokens=lambda config: config.max_num_batched_tokens + 1)
    ),
    "there is one seat too many": KnownBadScheduler(
        "I15", _with_config(max_num_running=lambda config: config.max_num_running + 1)
    ),
    "tokens are computed twice": KnownBadScheduler("I15", _plain(ComputesTwice)),
    "tokens are skipped": KnownBadScheduler("I15", _plain(SkipsTokens)),
    "salts are forgotten": KnownBadScheduler("I15", _plain(ForgetsSalts)),
    "preemptions are counted wrongly": KnownBadScheduler("I16", _plain(CountsPreemptionsWrongly)),
    "resumed requests count as new": KnownBadScheduler("I16", _plain(CountsResumedAsNew)),
    "counters fall": KnownBadScheduler(
        "I16", lambda config, cache, sink: Scheduler(config, ForgetfulManager(cache), sink=sink)
    ),
    "more is hit than was asked for": KnownBadScheduler(
        "I16",
        lambda config, cache, sink: Scheduler(config, KVCacheManager(cache), sink=_Renaming(sink, _boast)),
    ),
}
"""Every bug by name."""
