"""Requests that arrive one after the other, served by static batches of `generate` and by the engine, on one clock.

The clock runs with the CPU time of the serving thread and jumps over the time in which nobody waits: other programs on the
machine do not show. How fast it is changes all the same, from second to second, so cases that are compared run side by side, a
step each in turn. Arrivals are Poisson, lengths those of the Azure conversation trace, divided.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_peers import VOCABULARY, padded_batch
from numpy.typing import NDArray
from public_traces import AZURE_CONVERSATION

from pagedkv.engine import LLM, RequestOutput, SamplingParams
from pagedkv.scheduler import SchedulerConfig
from pagedkv.simulations.traces import load_trace

DIVISOR = 8
NUM_REQUESTS = 256
MAX_BATCH = 32
LIMITS = SchedulerConfig(max_num_batched_tokens=512, max_num_running=64)
CALM_LIMITS = SchedulerConfig(max_num_batched_tokens=2048, max_num_running=64, admission_interval=64)
"""Prompts are computed together, 64 steps apart: the time per token instead of that to the first one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, how many tokens each wants, and Poisson arrivals at one request a second."""

    prompts: list[list[int]]
    num_new: list[int]
    arrivals: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Latencies:
    """90th percentiles in seconds, and the time from the first arrival to the last token."""

    ttft_s: float
    tpot_s: float
    makespan_s: float


class WorkClock:
    """CPU time of this thread, and the waiting that was jumped over."""

    def __init__(self) -> None:
        self._offset = -time.thread_time()

    def __call__(self) -> float:
        return time.thread_time() + self._offset

    def jump_to(self, moment: float) -> None:
        """Wait until then, if it is still to come."""
        self._offset += max(0.0, moment - self())


class Turns:
    """Lets several threads run one after the other, each until it passes its turn on."""

    def __init__(self, num_threads: int) -> None:
        self._waiting = list(range(num_threads))
        self._changed = threading.Condition()

    def wait(self, idx: int) -> None:
        """Wait until it is the turn of thread `idx`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == idx)

    def end(self) -> None:
        """The thread whose turn it is has ended."""
        with self._changed:
            self._waiting.pop(0)
            self._changed.notify_all()

    def pass_on(self) -> None:
        """End this thread's turn, and wait for its next one."""
        with self._changed:
            own = self._waiting.pop(0)
            self._waiting.append(own)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting[0] == own)


def side_by_side(cases: dict[str, Callable[[Callable[[], None]], Latencies]]) -> dict[str, Latencies]:
    """Run all cases, each in a thread of its own, a step each in turn. A case calls what it is given after each step."""
    turns = Turns(len(cases))
    found: dict[str, Latencies] = {}

    def run(idx: int, name: str) -> None:
        torch.set_num_threads(1)  # A setting of each thread.
        turns.wait(idx)
        try:
            found[name] = cases[name](turns.pass_on)
        finally:
            turns.end()

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in cases}


def azure_workload(seed: int = 0, first: int = 0) -> Workload:
    """`NUM_REQUESTS` requests of the trace from the `first`-th on, lengths divided by `DIVISOR`, two new tokens at least."""
    trace = load_trace(AZURE_CONVERSATION)
    rng = np.random.default_rng(seed)
    lengths = np.maximum(trace.prompt_tokens[first : first + NUM_REQUESTS] // DIVISOR, 1)
    num_new = np.maximum(trace.output_tokens[first : first + NUM_REQUESTS] // DIVISOR, 2)
    prompts = [rng.integers(1, VOCABULARY, length).tolist() for length in lengths.tolist()]
    return Workload(prompts, num_new.tolist(), rng.exponential(size=NUM_REQUESTS).cumsum())


def serve_static(model: Any, work: Workload, rate: float, *, on_step: Callable[[], None] = lambda: None) -> Latencies:
    """Whoever waits when the last batch is done forms the next one. A request's tokens count as soon as they are there."""
    arrivals = work.arrivals / rate
    clock = WorkClock()
    first, last = np.zeros(len(arrivals)), np.zeros(len(arrivals))
    start = 0
    while start < len(arrivals):
        clock.jump_to(arrivals[start])
        stop = min(int(np.searchsorted(arrivals, clock(), side="right")), start + MAX_BATCH)
        moments: list[float] = []
        num_new = work.num_new[start:stop]

        def note(moments: list[float] = moments) -> None:
            moments.append(clock())
            on_step()

        padded_batch(model, work.prompts[start:stop], max(num_new), on_step=note)
        first[start:stop] = moments[0]
        last[start:stop] = [moments[num - 1] for num in num_new]
        start = stop
    return _latencies(arrivals, first, last, np.array(work.num_new))


def serve_engine(
    model: Any,
    work: Workload,
    rate: float,
    *,
    limits: SchedulerConfig = LIMITS,
    record: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Latencies:
    """The engine steps whenever it has work; requests join when they arrive. `record`: a folder for the run."""
    arrivals = work.arrivals / rate
    clock = WorkClock()
    llm = LLM(model, num_blocks=4096, scheduler_config=limits, self_check=False, record=record, clock=clock)
    origin = clock()
    arrivals = arrivals + origin
    ended: dict[str, RequestOutput] = {}

    def keep(output: RequestOutput) -> None:
        ended[output.request_id] = output

    added = 0
    while len(ended) < len(arrivals):
        if not llm.engine.has_work:
            clock.jump_to(arrivals[added])
        while added < len(arrivals) and arrivals[added] <= clock():
            params = SamplingParams(max_tokens=work.num_new[added], temperature=0)
            token_ids, params = llm.check(work.prompts[added], params)
            llm.engine.add(str(added), token_ids, params, on_finish=keep)
            added += 1
        llm.engine.step()
        on_step()
    llm.close()
    timings = [ended[str(i)].timings for i in range(len(arrivals))]
    first = np.array([timing.first_token_s for timing in timings])
    return _latencies(arrivals, first, np.array([timing.finished_s for timing in timings]), np.array(work.num_new))


def static_capacity(model: Any, work: Workload) -> float:
    """Requests a second that full static batches complete when everybody is there from the start."""
    makespan = serve_static(model, work, rate=1e9).makespan_s
    return len(work.prompts) / makespan


def _latencies(
    arrivals: NDArray[np.float64],
    first: NDArray[np.float64],
    last: NDArray[np.float64],
    num_new: NDArray[np.int64],
) -> Latencies:
    tpot = (last - first) / (num_new - 1)
    return Latencies(
        float(np.quantile(first - arrivals, 0.9)), float(np.quantile(tpot, 0.9)), float(last.max() - arrivals[0])
    )
