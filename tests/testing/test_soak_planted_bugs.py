"""Bugs of one line, planted into scheduler and memory: a short soak run must notice each. `pytest -s` tells how.

A bug replaces a piece of the source of one function; if that piece is no longer there, the test fails and says so.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pagedkv.content import TokenContent
from pagedkv.draft_slots import DraftSlots
from pagedkv.row_memory import RowMemory
from pagedkv.scheduler import planning, rollback
from pagedkv.scheduler import scheduler as scheduler_module
from pagedkv.scheduler.admission import Admission
from pagedkv.scheduler.catch_up import CatchUp
from pagedkv.scheduler.drafts import Drafting
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sampling import Sampling
from pagedkv.scheduler.shortage import Shortage
from pagedkv.shared_tails import SharedTails
from pagedkv.testing.soak import SoakConfig, SoakFailedError, run_soak

Scheduler = scheduler_module.Scheduler


@dataclass(frozen=True)
class Bug:
    owner: object
    function: str
    found: str
    planted: str


BUGS = {
    # Steps that fail
    "a failed plan is not taken back": Bug(Scheduler, "schedule", "self._take_back(", "(lambda *_, **__: None)("),
    "a failed step keeps its names": Bug(RowMemory, "unname_step", "self.cache.unname(named)", "pass"),
    "a failed step keeps what others were to fill": Bug(rollback, "_num_written", "if len(missing):", "if False:"),
    "a failed step keeps its copies": Bug(rollback, "_num_written", "in copied", "in ()"),
    "a failed step keeps what was swapped in": Bug(
        planning, "retract_step", "num_valid[row] = min(num_valid[row], num_kept)", "pass"
    ),
    "a failed step keeps what was swapped out": Bug(planning.StepPlanner, "take_back", "self._shortage.forget_swaps()", "pass"),
    "a failed step keeps its forks": Bug(Scheduler, "_take_back", "self._undo_fork(first, sibling)", "pass"),
    "a failed admission keeps its row": Bug(
        Admission, "_try_admit", "self._start_over(sample)\n        raise\n", "raise\n"
    ),
    "a failed growth keeps its blocks": Bug(
        RowMemory, "try_append_run", "table.reserve_width(total)\n        block_ids = self.pool.try_allocate(total - held)",
        "block_ids = self.pool.try_allocate(total - held); table.reserve_width(total)",
    ),
    "a failed fork keeps its blocks": Bug(
        RowMemory, "fork",
        "child = table.add(child_content, num_known, block_ids, num_computed)\n    self.pool.acquire(block_ids)",
        "self.pool.acquire(block_ids)\n    child = table.add(child_content, num_known, block_ids, num_computed)",
    ),
    "a failed fork keeps the ones before": Bug(Sampling, "_fork", "self._memory.close(row)", "pass"),
    # Ends
    "an abort keeps host blocks": Bug(
        Scheduler, "abort", "if state is SampleState.SWAPPED:\n                self._close_row(sample)", "pass"
    ),
    "an abort in flight is forgotten": Bug(
        Scheduler, "_close_row", "self._left_in_flight.append(sample.row)", "pass"
    ),
    "an aborted row keeps its seat": Bug(Scheduler, "_leave", "self._running.remove(sample)", "pass"),
    "a finished request stays live": Bug(Scheduler, "_end", "del self._live[sample.request.request_id]", "pass"),
    "a duplicate id is taken": Bug(Scheduler, "add", "if request_id in self._live:", "if False:"),
    "an unknown id is no error": Bug(
        Scheduler, "abort", "raise UnknownIdError(", "return str("
    ),
    "a plan may be updated twice": Bug(Scheduler, "update", "self._check_in_flight(plan)", "pass"),
    # Shortage
    "nobody tells of blocks that others gave back": Bug(
        planning.StepPlanner, "plan", "not self.num_steps_closed(step)) or not len(rows)", "not self.num_steps_closed(step))"
    ),
    "what can never fit is taken": Bug(
        Scheduler, "add",
        "if reason:\n        self._refuse(request_id, reason, now)\n        raise RequestTooLargeError(",
        "if False:\n        self._refuse(request_id, reason, now)\n        raise RequestTooLargeError(",
    ),
    "what just fits is refused": Bug(
        scheduler_module, "reason_to_refuse", "max(request.max_new_tokens - 1, 0)", "request.max_new_tokens"
    ),
    "a step exceeds its budget": Bug(CatchUp, "_share_budget", "self._config.max_num_batched_tokens -", "999 -"),
    "a request takes one seat too many": Bug(
        Admission, "admit", "> max_running", "> max_running + 1"
    ),
    "preemptions are not counted": Bug(Shortage, "preempt", "sample.num_preemptions += 1", "pass"),
    "hits are counted twice": Bug(
        Admission, "_try_admit", "start // memory.block_size, memory", "2 * start // memory.block_size, memory"
    ),
    # Content
    "swapped in reversed": Bug(
        RowMemory, "try_swap_in", "BlockCopies(host_blocks[num_hits:]", "BlockCopies(host_blocks[num_hits:][::-1]"
    ),
    "a shared tail is written in place": Bug(SharedTails, "rows_to_copy", "num_holders > 1 or", "num_holders > 2 or"),
    "salts share": Bug(
        sys.modules["pagedkv.manager"], "root_key", "+ _field(salt)", "+ _field(b'')"
    ),
    "keys are four bits long, and trusted": Bug(
        TokenContent, "keys", "chain_keys(parent, self._data[start:stop], self._block_bytes)",
        "[bytes([key[0] & 15]) for key in chain_keys(parent, self._data[start:stop], self._block_bytes)]",
    ),
    "rejected drafts stay": Bug(DraftSlots, "settle", "stops = starts + num_accepted", "stops = starts + table.num_drafts[rows]"),
    "what comes behind a stop token stays": Bug(
        Drafting, "_cut_at_stops", "if token in stops), len(run))", "if False), len(run))"
    ),
    "a seat is kept for nobody": Bug(RunningRows, "mark_forked", "self.num_seats -= sample.num_samples - 1", "pass"),
}  # fmt: skip

SOURCES = {name: textwrap.dedent(inspect.getsource(getattr(bug.owner, bug.function))) for name, bug in BUGS.items()}


def plant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, source = BUGS[name], SOURCES[name]
    if source.count(bug.found) != 1:
        pytest.fail(f"{bug.function} no longer holds {bug.found!r} once: plant this bug anew")
    function = getattr(bug.owner, bug.function)
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(source.replace(bug.found, bug.planted), "<planted>", "exec"), namespace)  # noqa: S102 - our own source
    monkeypatch.setattr(bug.owner, bug.function, namespace[bug.function])


@pytest.fixture(scope="module")
def verdicts() -> Iterator[dict[str, str]]:
    verdicts: dict[str, str] = {}
    yield verdicts
    width = max(map(len, verdicts), default=0)
    print(*("", *(f"{name:{width}}  {verdict}" for name, verdict in verdicts.items())), sep="\n")


# These take one run or two to be noticed; the others up to forty.
QUICK = {
    "a failed plan is not taken back",
    "a failed step keeps its copies",
    "an abort in flight is forgotten",
    "a duplicate id is taken",
    "a plan may be updated twice",
    "what can never fit is taken",
    "a shared tail is written in place",
    "salts share",
    "keys are four bits long, and trusted",
    "a step exceeds its budget",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BUGS])
def test_a_soak_run_notices_that(name: str, verdicts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(name, monkeypatch)
    failure = first_failure(60)
    verdicts[name] = "NOT NOTICED" if failure is None else str(failure)[:150]
    assert failure is not None, f"nothing noticed that {name}"


def first_failure(num_seeds: int) -> SoakFailedError | None:
    for seed in range(num_seeds):
        try:
            run_soak(SoakConfig(0.25, seed))
        except SoakFailedError as failure:
            return failure
    return None
