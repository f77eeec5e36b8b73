"""An engine with real tokens, whose model is a cost model and whose clock is virtual, that records what it does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.engine.run_record import RunRecorder
from pagedkv.scheduler import (
    FCFS,
    LatestArrival,
    LowestPriority,
    PreemptionPolicy,
    Priority,
    Recompute,
    Request,
    Scheduler,
    SchedulerConfig,
)
from pagedkv.simulations.cost_models import LinearCostModel
from pagedkv.simulations.simulator import load_of

STOP_TOKEN = 7
COSTS = LinearCostModel(
    base_s=3e-3,
    per_token_s=2e-4,
    per_context_token_s=5e-6,
    per_row_s=1e-4,
    per_attention_pair_s=1e-6,
    per_copied_block_s=4e-5,
    per_swapped_block_s=3e-4,
)


class RecordedEngine:
    """Serves requests until all have ended. `stops` says at which length a sample meets its stop token."""

    def __init__(self, scheduler: Scheduler, recorder: RunRecorder, costs: LinearCostModel = COSTS) -> None:
        self.scheduler = scheduler
        self.recorder = recorder
        self.costs = costs
        self.seats: dict[int, tuple[str, int]] = {}
        self.num_tokens: dict[tuple[str, int], int] = {}
        self.first_token_s: dict[tuple[str, int], float] = {}
        self.ended_s: dict[tuple[str, int], float] = {}
        self.requests: dict[str, Request] = {}
        self.next_token = 1000

    def serve(
        self,
        arrivals: list[tuple[float, Request]],
        stops: dict[tuple[str, int], int] | None = None,
        aborts: Iterable[tuple[float, str]] = (),
        *,
        pause_s: float = 0.0,
    ) -> None:
        waiting, to_abort = list(arrivals), list(aborts)
        clock = 0.0
        while waiting or self.scheduler.has_work:
            if not self.scheduler.has_work:
                clock = max(clock, waiting[0][0])
            while waiting and waiting[0][0] <= clock:
                self._add(*waiting.pop(0))
            clock = self._step(clock, stops or {})
            for time_s, request_id in [abort for abort in to_abort if abort[0] <= clock]:
                to_abort.remove((time_s, request_id))
                self._abort(request_id, clock)
            clock += pause_s

    def _add(self, now: float, request: Request) -> None:
        self.scheduler.add(request, now)
        self.recorder.on_request(request, now)
        self.requests[request.request_id] = request

    def _step(self, start: float, stops: dict[tuple[str, int], int]) -> float:
        scheduler = self.scheduler
        plan = scheduler.schedule(start)
        for row, request_id, sample_idx in plan.admitted:
            self.seats[row] = (request_id, sample_idx)
        end = start + self.costs.step_time(load_of(plan))
        samples = [self.seats[row] for row in plan.sampling_rows.tolist()]
        tokens = []
        for sample in samples:
            self.num_tokens[sample] = self.num_tokens.get(sample, 0) + 1
            self.first_token_s.setdefault(sample, end)
            self.next_token += 1
            tokens.append(STOP_TOKEN if self.num_tokens[sample] == stops.get(sample) else self.next_token)
        waiting, used = scheduler.num_waiting, scheduler.manager.memory.pool.num_used
        events = scheduler.update(plan, tokens, end)
        self.recorder.on_step(plan, start, end, num_waiting=waiting, num_used_blocks=used)
        for sample, reason in events.finished:
            self._end(sample.request.request_id, sample.sample_idx, reason, end, sample.num_preemptions)
        return end

    def _abort(self, request_id: str, now: float) -> None:
        self.scheduler.abort(request_id, now)
        for sample_idx in range(self.requests[request_id].n):
            if (request_id, sample_idx) not in self.ended_s:
                self._end(request_id, sample_idx, "abort", now, 0)

    def _end(self, request_id: str, sample_idx: int, reason: str, end: float, num_preemptions: int) -> None:
        sample = (request_id, sample_idx)
        self.ended_s[sample] = end
        self.recorder.on_finish(
            request_id,
            sample_idx,
            reason,
            first_token_s=self.first_token_s.get(sample),
            end_s=end,
            num_output_tokens=self.num_tokens.get(sample, 0),
            num_preemptions=num_preemptions,
        )


def make_scheduler(
    *, num_blocks: int = 1000, preemption: PreemptionPolicy | None = None, by_priority: bool = False
) -> Scheduler:
    """Blocks of 4 tokens, as many on the host, 32 tokens a step, 8 seats."""
    manager = KVCacheManager(CacheConfig(num_blocks, 4, num_host_blocks=num_blocks))
    return Scheduler(
        SchedulerConfig(max_num_batched_tokens=32, max_num_running=8, watermark=0.0),
        manager,
        policy=Priority() if by_priority else FCFS(),
        victim=LowestPriority() if by_priority else LatestArrival(),
        preemption=preemption or Recompute(),
    )


def make_requests(seed: int, num_requests: int = 60) -> tuple[list[tuple[float, Request]], dict[tuple[str, int], int]]:
    """Bursts of requests with shared prompts, one to three samples of unlike lengths, priorities; and where they stop."""
    random = np.random.default_rng(seed)
    families = [random.integers(100, 200, 24).tolist() for _ in range(3)]
    arrivals, stops, now = [], {}, 0.0
    for i in range(num_requests):
        now += float(random.exponential(0.02)) if random.random() < 0.5 else 0.0
        own = random.integers(200, 300, int(random.integers(1, 20))).tolist()
        prompt = families[int(random.integers(3))][: int(random.integers(0, 25))] + own
        num_samples = int(random.choice([1, 1, 2, 3]))
        request = Request(
            f"request {i}",
            prompt,
            max_new_tokens=int(random.integers(0, 25)),
            n=num_samples,
            priority=float(random.integers(0, 3)),
            stop_token_ids=(STOP_TOKEN,),
        )
        for sample_idx in range(num_samples):
            if random.random() < 0.5:
                stops[request.request_id, sample_idx] = int(random.integers(1, 25))
        arrivals.append((now, request))
    return arrivals, stops


def record_run(
    folder: Path,
    seed: int,
    *,
    num_blocks: int = 1000,
    preemption: PreemptionPolicy | None = None,
    by_priority: bool = False,
) -> RecordedEngine:
    """Serve and record the requests of `seed`."""
    scheduler = make_scheduler(num_blocks=num_blocks, preemption=preemption, by_priority=by_priority)
    with RunRecorder(folder, scheduler, model={"name": "toy", "device": "none"}) as recorder:
        engine = RecordedEngine(scheduler, recorder)
        engine.serve(*make_requests(seed))
    return engine
