"""Runs one scenario on any scheduler and keeps its own books of every token, seat and event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from typing import Protocol

import numpy as np

from pagedkv.arrays import cdiv
from pagedkv.config import CacheConfig
from pagedkv.errors import InvariantViolation, PagedKVError
from pagedkv.scheduler import Event, EventLog, EventSink, Request, Scheduler, SchedulerConfig, StepPlan, steps_to_serve
from pagedkv.scheduler.events import Admitted, Preempted
from pagedkv.testing.event_log import EventLogSummary, check_event_log
from pagedkv.testing.scheduler_shadow import Answer, ShadowEngine, answers_to, root_state

__all__ = ["Drive", "MakeScheduler", "Scenario"]


class MakeScheduler(Protocol):
    """What a user supplies: a scheduler with these limits and an empty memory of this size, that tells `sink` its events."""

    def __call__(self, config: SchedulerConfig, cache_config: CacheConfig, sink: EventSink) -> Scheduler:
        """Make one."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests by the step before which they come, on a small service; `aborts` are (step, request id).

    `is_overloaded`: far more is asked for than fits, so that a scheduler must preempt, or make others wait.
    """

    name: str
    config: SchedulerConfig
    cache: CacheConfig
    arrivals: tuple[tuple[int, Request], ...]
    aborts: tuple[tuple[int, str], ...] = ()

    @property
    def max_steps(self) -> int:
        """Steps in which everybody must be through: those until the last one comes, and those that serving all may take."""
        serving = sum(
            steps_to_serve(len(np.asarray(request.prompt)), request.max_new_tokens, request.n, self.config)
            for _, request in self.arrivals
        )
        return serving + max((step for step, _ in self.arrivals), default=0)


@dataclass
class Drive:
    """One run. `enforced` is the invariant to hold the scheduler to; what breaks another one is let pass, if it can be.

    Everything is counted from plans and events, never read from the scheduler, but for the figures that are compared.
    """

    make: MakeScheduler
    scenario: Scenario
    enforced: str
    rename: Callable[[str], str] = str
    max_preemptions: int | None = None
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    num_computed: dict[tuple[str, int], int] = field(default_factory=dict)
    num_preemptions: dict[tuple[str, int], int] = field(default_factory=dict)
    came_as: dict[str, int] = field(default_factory=dict)
    num_passed: dict[str, int] = field(default_factory=dict)
    """How often each that has not run yet was passed by one that came later."""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = StringIO()
        self._log = EventLog(self.file)
        self.scheduler = self.make(self.scenario.config, self.scenario.cache, self)
        self.engine = ShadowEngine(self.scheduler)
        self.step_idx = 0
        self._last_counts = (0, 0, 0)

    def emit(self, event: Event) -> None:
        """Take an event of the scheduler under test."""
        self._log.emit(event)
        self.events.append(event)

    def run(self) -> str:
        """Run to the end; returns the event log. Raises InvariantViolation for what is enforced."""
        arrivals = list(self.scenario.arrivals)
        aborts = list(self.scenario.aborts)
        bound = self.scenario.max_steps
        num_empty = 0
        while arrivals or self.scheduler.has_work:
            while arrivals and arrivals[0][0] <= self.step_idx:
                self._add(arrivals.pop(0)[1])
            while aborts and aborts[0][0] <= self.step_idx:
                self._abort(aborts.pop(0)[1])
            num_empty = 0 if self._step() or not self.scheduler.has_work else num_empty + 1
            self.require("I11", num_empty < 3, "requests wait, and nothing runs in three steps")
            self.step_idx += 1
            if self.step_idx > bound or num_empty >= 3:
                self.require("I11", False, f"{len(self.answers)} requests are not through after {self.step_idx} steps")
                break
        else:
            self._check_end()
        return self.file.getvalue()

    def require(self, invariant: str, holds: bool, what: str) -> None:
        """Raise InvariantViolation if this is the invariant that is enforced, and it does not hold."""
        if invariant == self.enforced and not holds:
            raise InvariantViolation(invariant, f"scenario {self.scenario.name!r}, step {self.step_idx}: {what}")

    # What happens

    def _add(self, request: Request) -> None:
        config, cache = self.scenario.config, self.scenario.cache
        num_slots = len(np.asarray(request.prompt)) + max(request.max_new_tokens, 1) - 1
        fits = cdiv(num_slots, cache.block_size) <= cache.num_blocks and request.n <= config.max_num_running
        fits &= config.chunked_prefill or num_slots <= config.max_num_batched_tokens
        renamed = _renamed(request, self.rename)
        try:
            self.scheduler.add(renamed, float(self.step_idx))
        except PagedKVError as error:
            self.require("I12", not fits, f"{renamed.request_id!r} fits alone, and was refused: {error}")
            return
        self.require("I12", fits, f"{renamed.request_id!r} can never fit, and was taken")
        if fits:
            self.answers[renamed.request_id] = answers_to(renamed)
            self.engine.roots[renamed.request_id] = root_state(renamed)
            self.came_as[renamed.request_id] = len(self.came_as)
            self.num_passed[renamed.request_id] = 0

    def _abort(self, request_id: str) -> None:
        request_id = self.rename(request_id)
        if self.answers.pop(request_id, None) is not None:
            self.scheduler.abort(request_id, float(self.step_idx))

    def _step(self) -> bool:
        """One step, if there is anything to do; returns whether anything was computed."""
        if not self.scheduler.has_work:
            return False
        first_event = len(self.events)
        plan = self.scheduler.schedule(float(self.step_idx))
        self.engine.take_seats(plan)
        self._check_preemptions(first_event)
        is_sound = self._check_plan(plan)
        self.engine.move_blocks(plan)
        tokens = self.engine.compute(plan)
        if is_sound:
            self._give(plan, tokens if isinstance(tokens, list) else [])
        self.scheduler.update(plan, tokens, float(self.step_idx))
        for request_id in [id_ for id_, answers in self.answers.items() if all(map(_is_through, answers))]:
            del self.answers[request_id]
        self._check_counts()
        return bool(len(plan.rows))

    def _give(self, plan: StepPlan, tokens: list[int]) -> None:
        """Note what each sample was given; it must be what the model says without any cache."""
        for row, token in zip(plan.sampling_rows.tolist(), tokens, strict=True):
            request_id, idx = self.engine.seats[row]
            if request_id in self.answers:
                answer = self.answers[request_id][idx]
                right = answer.token_ids[answer.num_given : answer.num_given + 1]
                self.require("I15", [token] == right, f"{request_id!r} got a token that skips or repeats others")
                answer.num_given += 1
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True):
            request_id, idx = self.engine.seats[row]
            if request_id in self.answers and not self.answers[request_id][idx].token_ids:
                answer = self.answers[request_id][idx]
                answer.has_ended = start + count == answer.num_prompt

    # Checks

    def _check_preemptions(self, first_event: int) -> None:
        """What the events of this plan say of preemptions (I11, I13)."""
        for event in self.events[first_event:]:
            if isinstance(event, Preempted):
                seat = (event.request_id, event.sample_idx)
                self.num_preemptions[seat] = count = self.num_preemptions.get(seat, 0) + 1
                gains = event.num_used_before > event.num_used_after
                is_alone = len(self.answers.get(seat[0], ())) == 1  # Samples of one request share blocks.
                self.require("I11", gains or not is_alone, f"{seat[0]!r} was preempted, and no block was gained")
                most = self.scenario.config.max_preemptions if self.max_preemptions is None else self.max_preemptions
                self.require(
                    "I13", count <= most, f"{seat[0]!r} was preempted {count} times, at most {most} are allowed"
                )
            elif isinstance(event, Admitted):
                self._note_admission(event.request_id)

    def _note_admission(self, request_id: str) -> None:
        """Whoever came before and still waits for the first time was passed once more (I13)."""
        if request_id in self.num_passed:
            del self.num_passed[request_id]
            arrival = self.came_as[request_id]
            most = self.scenario.config.max_bypasses
            for other in self.num_passed:
                if self.came_as[other] < arrival and other in self.answers:
                    self.num_passed[other] = count = self.num_passed[other] + 1
                    is_fine = count <= most
                    self.require(
                        "I13", is_fine, f"{other!r} was passed by {count} later requests, at most {most} may pass"
                    )

    def _check_plan(self, plan: StepPlan) -> bool:
        """Budget, seats, and each token once (I15). Returns whether the books can follow."""
        config = self.scenario.config
        num_tokens = int(plan.num_tokens.sum())
        self.require("I15", num_tokens <= config.max_num_batched_tokens, f"{num_tokens} tokens are planned")
        rows = plan.rows.tolist()
        self.require("I15", len(set(rows)) == len(rows), "a row stands twice in a plan")
        fresh = {seat.row for seat in plan.admitted}
        is_sound = True
        for row, start, count in zip(rows, plan.starts.tolist(), plan.num_tokens.tolist(), strict=True):
            seat = self.engine.seats.get(row)
            if seat is None or seat[0] not in self.answers:
                self.require("I15", False, f"row {row} runs for nobody")
                return False
            is_sound &= self._check_row(row, start, count, is_fresh=row in fresh)
        seated = {self.engine.seats[row] for row in rows}
        self.require("I15", len(seated) <= config.max_num_running, f"{len(seated)} samples run")
        return is_sound and all(self.engine.seats[row][0] in self.answers for row in plan.sampling_rows.tolist())

    def _check_row(self, row: int, start: int, count: int, *, is_fresh: bool) -> bool:
        """The tokens of one row follow those computed before; one that begins may start behind whole hit blocks."""
        seat = self.engine.seats[row]
        answer = self.answers[seat[0]][seat[1]]
        known = answer.num_prompt + answer.num_given
        before = self.num_computed.get(seat, answer.num_prompt if seat[1] else 0)
        is_hit = start % self.scenario.cache.block_size == 0 and start < known
        follows = start == before or (is_fresh and is_hit)
        self.require("I15", follows, f"{seat[0]!r} computes from position {start}, computed are {before}")
        fits = count >= 1 and start + count <= known
        self.require("I15", fits, f"{seat[0]!r} computes {count} tokens from {start} of {known} known ones")
        self.num_computed[seat] = start + count
        return follows and fits

    def _check_counts(self) -> None:
        """Figures in their range, and counters that never fall (I16)."""
        statistics = self.scheduler.manager.statistics()
        self.require("I16", 0 <= statistics.utilization <= 1, f"utilisation is {statistics.utilization}")
        prefix = statistics.prefix
        counts = (prefix.num_queries, prefix.queried_tokens, prefix.hit_tokens)
        self.require("I16", prefix.hit_tokens <= prefix.queried_tokens, "more tokens are hit than asked for")
        is_rising = all(now >= before for now, before in zip(counts, self._last_counts, strict=True))
        self.require("I16", is_rising, f"counters fell from {self._last_counts} to {counts}")
        self._last_counts = counts

    def _check_end(self) -> None:
        """Everybody is through: nothing is held (I10), and figures equal a recount of the log (I16)."""
        self.require("I11", not self.answers, f"{sorted(self.answers)[:5]} no longer run, without a complete answer")
        scheduler, statistics = self.scheduler, self.scheduler.manager.statistics()
        held = (statistics.num_used, statistics.num_host_used, statistics.num_sequences)
        queued = (scheduler.num_running, scheduler.num_waiting)
        self.require("I10", held == (0, 0, 0), f"blocks, host blocks and sequences that are left: {held}")
        self.require("I10", queued == (0, 0), f"running and waiting samples that are left: {queued}")
        told = self._recount()
        if told is None:
            return
        prefix = statistics.prefix
        for name in ("num_queries", "queried_tokens", "hit_tokens", "num_resumed_queries", "resumed_hit_tokens"):
            counted, recounted = getattr(prefix, name), getattr(told, name)
            self.require("I16", counted == recounted, f"{name} is {counted}, the event log tells of {recounted}")

    def _recount(self) -> EventLogSummary | None:
        """Recount the log; None if it is broken, which is told if its invariant is enforced."""
        lines = self.file.getvalue().splitlines()
        num_seats, num_blocks = self.scenario.config.max_num_running, self.scenario.cache.num_blocks
        try:
            return check_event_log(lines, max_num_running=num_seats, num_blocks=num_blocks, is_complete=True)
        except InvariantViolation as violation:
            self.require(violation.invariant, False, f"the event log contradicts itself: {violation}")
            return None


def _is_through(answer: Answer) -> bool:
    return answer.is_given if answer.token_ids else answer.has_ended


def _renamed(request: Request, rename: Callable[[str], str]) -> Request:
    """The same request under another id."""
    return Request(
        rename(request.request_id),
        request.prompt,
        request.max_new_tokens,
        priority=request.priority,
        salt=request.salt,
        stop_token_ids=request.stop_token_ids,
        n=request.n,
    )
