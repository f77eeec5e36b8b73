"""What must hold while faults are on, and what must come about once they stop. The world only tells what it did."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import numpy as np

from pagedkv.errors import InvariantViolation
from pagedkv.manager import KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, steps_to_serve
from pagedkv.testing.event_log import EventLogChecker
from pagedkv.testing.scheduler_shadow import Answer, ShadowEngine
from pagedkv.testing.soak.neighbour import Neighbour
from pagedkv.testing.soak.traffic import num_prompt_tokens

__all__ = ["LogFile", "check_content", "check_counters", "check_empty", "check_tokens", "steps_to_finish"]


class LogFile:
    """Takes what an EventLog writes: hashes the bytes, and has the checker read each line back."""

    def __init__(self, checker: EventLogChecker) -> None:
        self.checker = checker
        self._digest = sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of all lines so far: equal for equal seeds."""
        return self._digest.hexdigest()

    def write(self, line: str) -> int:
        """Take one line."""
        self._digest.update(line.encode())
        self.checker.take_line(line)
        return len(line)

    def flush(self) -> None:
        """Nothing is kept back."""


def check_content(engine: ShadowEngine, row: int, num_tokens: int, answer: Answer) -> None:
    """The first slots of a row hold exactly the states of its tokens (I4). O(tokens)."""
    kept, right = engine.kept_states(row, num_tokens), answer.states[:num_tokens]
    if not np.array_equal(kept, right):
        position = int(np.flatnonzero(kept != right)[0])
        request_id, sample_idx = engine.seats[row]
        block_id = int(engine.scheduler.block_tables[row, position // engine.block_size])
        raise InvariantViolation(
            "I4",
            f"request {request_id!r}, sample {sample_idx}: position {position} in block {block_id} holds other K/V",
        )


def check_tokens(seat: tuple[str, int], answer: Answer, tokens: list[int]) -> None:
    """These new tokens are the next ones of the right answer, and no more (I4)."""
    right = answer.token_ids[answer.num_given : answer.num_given + len(tokens)]
    if tokens != right:
        raise InvariantViolation(
            "I4", f"request {seat[0]!r}, sample {seat[1]}: wrong tokens from number {answer.num_given} on"
        )


def check_counters(manager: KVCacheManager, log: EventLogChecker, neighbour: Neighbour) -> None:
    """The memory's counters equal a recount of the log, and of what the neighbour asked for (I16)."""
    found, told = manager.statistics().prefix, log.summary
    pairs = {
        "queries": (found.num_queries, told.num_queries + neighbour.num_opened),
        "queried tokens": (found.queried_tokens, told.queried_tokens + neighbour.num_queried_tokens),
        "hit tokens": (found.hit_tokens, told.hit_tokens + neighbour.num_hit_tokens),
        "resumed queries": (found.num_resumed_queries, told.num_resumed_queries),
        "resumed queried tokens": (found.resumed_queried_tokens, told.resumed_queried_tokens),
        "resumed hit tokens": (found.resumed_hit_tokens, told.resumed_hit_tokens),
    }
    for name, (counted, recounted) in pairs.items():
        if counted != recounted:
            raise InvariantViolation("I16", f"{counted} {name} counted, the event log tells of {recounted}")


def check_empty(scheduler: Scheduler) -> None:
    """Nobody is there, so nothing is held (I10)."""
    statistics = scheduler.manager.statistics()
    held = {
        "device blocks": statistics.num_used,
        "host blocks": statistics.num_host_used,
        "sequences": statistics.num_sequences,
        "running samples": scheduler.num_running,
        "waiting samples": scheduler.num_waiting,
        "live requests": int(scheduler.has_work),
    }
    left = {name: number for name, number in held.items() if number}
    if left:
        raise InvariantViolation("I10", f"nobody is there, but left are {left}")
    scheduler.check_invariants()


def steps_to_finish(requests: Iterable[Request], config: SchedulerConfig) -> int:
    """The most steps in which all of these get through, as the scheduler states it. O(requests)."""
    return sum(
        steps_to_serve(num_prompt_tokens(request), request.max_new_tokens, request.n, config) for request in requests
    )
