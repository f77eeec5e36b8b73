"""The world around one service: clients, a clock, an engine that may fail, and somebody else in the same memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TextIO, cast

import numpy as np

from pagedkv.errors import (
    DuplicateIdError,
    InvalidArgumentError,
    InvariantViolation,
    StalePlanError,
    UnknownIdError,
)
from pagedkv.scheduler import EventLog, StepOutcome, StepPlan
from pagedkv.testing.event_log import EventLogChecker
from pagedkv.testing.scheduler_shadow import VOCABULARY, Answer, ShadowEngine, root_state
from pagedkv.testing.soak.checkers import (
    LogFile,
    check_content,
    check_counters,
    check_empty,
    check_tokens,
    steps_to_finish,
)
from pagedkv.testing.soak.fault_sources import FaultSource, NoFaults
from pagedkv.testing.soak.faulty_service import Faults, FaultyService
from pagedkv.testing.soak.neighbour import Neighbour
from pagedkv.testing.soak.scheduler_build import SchedulerFactory, build_scheduler
from pagedkv.testing.soak.settings import FaultKind, Service
from pagedkv.testing.soak.traffic import Traffic, Wish, fits_alone
from pagedkv.testing.state_digest import state_digest

__all__ = ["World"]

MAX_LIVE = 48
RECOUNT_EVERY = 50
STEP_S = 0.25
TOKEN_S = 0.004


class World(FaultyService):
    """One service from its first request to its last. Everything follows from the service, the faults and `rng`.

    `step` does what happens around one step, faults included, and checks what must hold; `drain` stops arrivals and faults
    and waits until everybody is through.
    """

    def __init__(
        self,
        service: Service,
        rng: np.random.Generator,
        faults: FaultSource | None = None,
        *,
        factory: SchedulerFactory = build_scheduler,
    ) -> None:
        self.rng = rng
        self.faults: FaultSource = NoFaults() if faults is None else faults
        self.log = LogFile(
            EventLogChecker(
                max_num_running=service.scheduler.max_num_running,
                num_blocks=service.cache.num_blocks,
                max_tokens_per_step=1 if service.accuracy is None else None,
            )
        )
        super().__init__(service, EventLog(cast("TextIO", self.log)), factory)
        self.engine = ShadowEngine(self.scheduler)
        self.neighbour = Neighbour(self.scheduler.manager, self.engine)
        self.traffic = Traffic(service, rng)
        self.wishes: dict[str, Wish] = {}
        self.clock_s = 0.0
        self.num_tokens = 0
        self.num_turned_away = 0
        self._copies_until_failure: int | None = None
        self._gone: list[str] = []
        self.fault_counts: dict[str, int] = dict.fromkeys(FaultKind, 0)

    @property
    def now(self) -> float:
        """The time that the scheduler is told: the world's, and what its clock is wrong by."""
        return self.clock_s + self.skew_s

    # What happens in and around one step

    def step(self) -> None:
        """Whatever happens until one more step is over, or until the next arrival if nobody is there."""
        faults = self.faults.at(self.num_steps)
        for kind in faults:
            self.fault_counts[kind] += 1
        was_shared = self.is_log_behind or self.neighbour.is_there
        self._arrivals()
        self._before_step(faults)
        self._expect_preemptions(is_shared=was_shared or self.neighbour.is_there)
        if not self.scheduler.has_work:
            self.clock_s = max(self.clock_s, self.traffic.next_arrival_s)
        else:
            self._arm(faults)
            plan = self._schedule(self._guesses())
            if plan is not None:
                self._carry_out(plan, faults)
        self._disarm()
        while self._gone:
            self.engine.roots.pop(self._gone.pop(), None)
        self.num_steps += 1
        if self.num_steps % RECOUNT_EVERY == 0:
            self.scheduler.check_invariants()
            if not self.is_log_behind:
                self._check_counters()

    def drain(self) -> int:
        """Stop arrivals and faults; everybody gets through within a bound (I11), and nothing stays behind (I10).

        Returns the number of steps that it took.
        """
        # What the last faults have left untold comes first, while the bound on preemptions does not hold yet.
        self._expect_preemptions(is_shared=self.is_log_behind or self.neighbour.is_there)
        self.neighbour.leave()
        self._copies_until_failure = None
        self.skew_s = max(self.skew_s, 0.0)
        bound = steps_to_finish((wish.request for wish in self.wishes.values()), self.service.scheduler)
        first_step = self.num_steps
        while self.scheduler.has_work:
            if self.num_steps - first_step == bound:
                raise InvariantViolation(
                    "I11", f"{sorted(self.wishes)[:10]} are not through after {bound} steps without faults"
                )
            plan = self._schedule(self._guesses())
            if plan is None or not plan.num_rows:
                raise InvariantViolation("I11", f"{self.scheduler.num_waiting} samples wait and nothing runs")
            self._carry_out(plan, {})
            self._expect_preemptions(is_shared=False)
            self.num_steps += 1
        if self.wishes:
            raise InvariantViolation("I9", f"{sorted(self.wishes)[:10]} have no complete answer, and no longer run")
        check_empty(self.scheduler)
        self._check_counters()
        self.log.checker.finish(is_complete=True)
        self.engine.seats.clear()
        return self.num_steps - first_step

    def _carry_out(self, plan: StepPlan, faults: Faults) -> None:
        """Run the plan, or fail at it, and report."""
        if int(plan.num_tokens.sum()) > self.service.scheduler.max_num_batched_tokens:
            raise InvariantViolation("I15", f"{plan.num_tokens.sum()} tokens in step {plan.step}")
        self.engine.take_seats(plan)
        duration_s = STEP_S + TOKEN_S * int(plan.num_tokens.sum())
        if FaultKind.COPY_LATE in faults:
            duration_s += faults[FaultKind.COPY_LATE]
        if FaultKind.ABORT in faults and faults[FaultKind.ABORT] % 2:
            self._abort_one()
        self.clock_s += duration_s
        if FaultKind.COPY_LATE in faults:
            self._arrivals()
        if FaultKind.BAD_CALL in faults:
            self._call_badly(plan)
        if self._fails(plan, faults):
            return
        self.engine.move_blocks(plan, times=2 if FaultKind.COPY_TWICE in faults else 1)
        outcome = self.engine.compute(plan)
        self._check_read(plan)
        self._update(plan, outcome)
        if FaultKind.COPY_TWICE in faults:
            self._expect(StalePlanError, lambda: self.scheduler.update(plan, outcome, self.now))

    def _fails(self, plan: StepPlan, faults: Faults) -> bool:
        """Whether the step fails now: no more is heard of it, or its copies stop halfway."""
        if FaultKind.COPY_PARTIAL in faults:
            self._copies_until_failure = faults[FaultKind.COPY_PARTIAL]
        num_copies = len(plan.swaps_out) + len(plan.copies) + len(plan.swaps_in)
        if self._copies_until_failure is not None and num_copies:
            self.engine.move_blocks(plan, at_most=self._copies_until_failure)
            self._copies_until_failure = None
        elif FaultKind.COPY_NEVER in faults:
            self.clock_s += 60.0
        else:
            return False
        self.engine.spoil(plan)
        self._ignoring_sink(lambda: self.scheduler.fail(plan, self.now, "the device was lost"))
        self._expect(StalePlanError, lambda: self.scheduler.fail(plan, self.now))
        return True

    def _update(self, plan: StepPlan, outcome: StepOutcome | list[int]) -> None:
        """Report what was sampled; whoever then has all of its answer is gone."""
        given, outcome = self._given(plan, outcome)
        for seat, tokens in given.items():
            answer = self._answer(seat)
            check_tokens(seat, answer, tokens)
            answer.num_given += len(tokens)
            self.num_tokens += len(tokens)
        # Samples that want no token end when their prompt is computed.
        is_known = self.scheduler.manager.memory.sequences
        for row in plan.rows.tolist():
            wish = self._wish_of(row)
            if wish is not None and wish.request.max_new_tokens == 0:
                wish.answers[0].has_ended = bool(is_known.num_computed[row] == is_known.num_known[row])
        self._ignoring_sink(lambda: self.scheduler.update(plan, outcome, self.now))
        for request_id in {self.engine.seats[row][0] for row in (*plan.rows.tolist(), *plan.sampling_rows.tolist())}:
            ended = self.wishes.get(request_id)
            if ended is not None and self._is_through(ended):
                self._forget(request_id)

    def _is_through(self, wish: Wish) -> bool:
        if wish.request.max_new_tokens == 0:
            return wish.answers[0].has_ended
        return all(answer.is_given for answer in wish.answers)

    def _given(
        self, plan: StepPlan, outcome: StepOutcome | list[int]
    ) -> tuple[dict[tuple[str, int], list[int]], StepOutcome]:
        """What each live sample gets of an outcome, and the outcome with the samples that the engine ends."""
        if isinstance(outcome, StepOutcome):
            sampled = [int(token) for token in np.asarray(outcome.token_ids)]
            counts = [int(count) for count in np.asarray(outcome.num_tokens)]
        else:
            sampled, counts = outcome, [1] * len(outcome)
        given: dict[tuple[str, int], list[int]] = {}
        kept: list[int] = []
        lengths: list[int] = []
        stopped: list[bool] = []
        first = 0
        for row, count in zip(plan.sampling_rows.tolist(), counts, strict=True):
            seat, wish = self.engine.seats[row], self._wish_of(row)
            tokens = sampled[first : first + count]
            first += count
            if wish is not None:
                answer = wish.answers[seat[1]]
                left = wish.stops_after - answer.num_given
                tokens = tokens[:left]
                stopped.append(len(tokens) == left)
                # The scheduler itself drops what comes behind a stop token.
                given[seat] = tokens[: len(answer.token_ids) - answer.num_given] or tokens
            else:
                stopped.append(False)
            kept += tokens
            lengths.append(len(tokens))
        return given, StepOutcome(kept, lengths, stopped)

    # Clients

    def _arrivals(self) -> None:
        while self.traffic.next_arrival_s <= self.clock_s:
            wish = self.traffic.draw()
            if len(self.wishes) >= MAX_LIVE:
                self.num_turned_away += 1
            else:
                self._add(wish)

    def _add(self, wish: Wish) -> None:
        """Bring a request, and write down who must be served."""
        request = wish.request
        may_run = fits_alone(request, self.service)
        if may_run:
            self.wishes[request.request_id] = wish
            if root := root_state(request):
                self.engine.roots[request.request_id] = root
        self._add_request(request, may_run=may_run)

    def _abort_one(self) -> None:
        """A client gives up, whatever state its request is in."""
        if self.wishes:
            ids = list(self.wishes)
            request_id = ids[int(self.rng.integers(len(ids)))]
            self._forget(request_id)
            self._abort_request(request_id)

    def _before_step(self, faults: Faults) -> None:
        """Faults that strike between two steps."""
        self.neighbour.leave(self.num_steps)
        if FaultKind.CLOCK_JUMP in faults:
            self.skew_s += faults[FaultKind.CLOCK_JUMP]
        if FaultKind.DUPLICATE_ID in faults and self.wishes:
            ids = list(self.wishes)
            twin = self.wishes[ids[faults[FaultKind.DUPLICATE_ID] % len(ids)]].request
            self._expect(DuplicateIdError, lambda: self.scheduler.add(dataclasses.replace(twin, prompt=[1]), self.now))
        if FaultKind.UNKNOWN_ID in faults:
            self._expect(UnknownIdError, lambda: self.scheduler.abort("nobody", self.now))
        if FaultKind.ABORT in faults and faults[FaultKind.ABORT] % 2 == 0:
            self._abort_one()
        self._take_memory(faults)

    def _call_badly(self, plan: StepPlan) -> None:
        scheduler, now = self.scheduler, self.now
        too_many = [0] * (len(plan.sampling_rows) + 1)
        self._expect(StalePlanError, lambda: scheduler.schedule(now))
        self._expect(InvalidArgumentError, lambda: scheduler.update(plan, too_many, now))
        self._expect(InvalidArgumentError, lambda: scheduler.update(plan, [], float("nan")))
        self._expect(InvalidArgumentError, lambda: scheduler.abort("nobody", float("inf")))

    # Checks

    def _expect_preemptions(self, *, is_shared: bool) -> None:
        """From now on the log may tell of so many preemptions of a sample (I13): the bound is that of memory of one's own."""
        self.log.checker.max_preemptions = None if is_shared else self.service.scheduler.max_preemptions

    def _check_read(self, plan: StepPlan) -> None:
        """All that each row has computed so far is in its slots, token by token."""
        for row, stop in zip(plan.rows.tolist(), plan.seq_lens.tolist(), strict=True):
            wish = self._wish_of(row)
            if wish is not None:
                answer = wish.answers[self.engine.seats[row][1]]
                # Drafts that will not come true are computed, too, but are nobody's tokens.
                num_known = min(stop, answer.num_prompt + answer.num_given)
                check_content(self.engine, row, num_known, answer)

    def _check_counters(self) -> None:
        check_counters(self.scheduler.manager, self.log.checker, self.neighbour)

    def _expect(self, error: type[Exception], call: Callable[[], object]) -> None:
        """The call is refused with this error, and nothing has changed (I8)."""
        before = state_digest(self.scheduler.manager)
        try:
            call()
        except error:
            if state_digest(self.scheduler.manager) != before:
                raise InvariantViolation("I8", f"a call that raised {error.__name__} has changed the memory") from None
            return
        raise InvariantViolation("I8", f"a call that should raise {error.__name__} went through")

    # Finding one's way

    def _guesses(self) -> dict[int, list[int]] | None:
        """Drafts for some of the running rows, each token right with the service's accuracy."""
        accuracy = self.service.accuracy
        if accuracy is None:
            return None
        drafts = {}
        for row in self.scheduler.running_rows.tolist():
            wish = self._wish_of(row) if row in self.engine.seats else None
            if wish is not None and self.rng.random() < 0.5:
                answer = wish.answers[self.engine.seats[row][1]]
                right = answer.token_ids[answer.num_given :][: int(self.rng.integers(0, 5))]
                is_right = self.rng.random(len(right)) < accuracy
                drafts[row] = [
                    token if known else (token + 1) % VOCABULARY
                    for token, known in zip(right, is_right.tolist(), strict=True)
                ]
        return drafts

    def _forget(self, request_id: str) -> None:
        del self.wishes[request_id]
        self._gone.append(request_id)  # Its root is still needed, if a step is in flight.

    def _wish_of(self, row: int) -> Wish | None:
        """Who runs in a row, None if it was aborted."""
        return self.wishes.get(self.engine.seats[row][0])

    def _answer(self, seat: tuple[str, int]) -> Answer:
        return self.wishes[seat[0]].answers[seat[1]]
