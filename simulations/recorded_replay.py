"""Replay a recorded run on the engine that it was recorded with, or on one that differs where asked to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv import ConfigError
from pagedkv.arrays import Int32s, Rows
from pagedkv.scheduler import EventSink, Recompute, Request, Scheduler, StepPlan
from pagedkv.simulations.cost_models import CostModel, RooflineCostModel, fit_steps
from pagedkv.simulations.replay import (
    HARDWARE_OPTIONS,
    ReplayConfig,
    StepCosts,
    VirtualEngine,
    describe_engine,
    hardware_of,
    make_run,
    order_named,
    preemption_named,
    require_matching_blocks,
    scale_arrivals,
)
from pagedkv.simulations.run import RequestLog, Run
from pagedkv.simulations.run_records import RecordedRequests, RunRecord
from pagedkv.simulations.simulator import EventTee, Simulator
from pagedkv.simulations.traces import Trace

__all__ = ["RecordedSimulator", "replay_run"]

CACHE_OPTIONS = ("block_size", "num_blocks", "num_host_blocks", "prefix_caching")
LIMIT_OPTIONS = (
    "max_num_batched_tokens",
    "max_num_running",
    "long_prefill_tokens",
    "admission_interval",
    "chunked_prefill",
    "watermark",
    "max_bypasses",
    "max_preemptions",
    "client_share",
)
OUTCOME_FREE_OPTIONS = ("leaps", "checks")
STOP_TOKEN = 1
NEVER = 2**62


class RecordedSimulator(Simulator):
    """Replays requests with all that their record knows: samples, the length of each, priority.

    Samples that ended before their full length meet a stop token: in a step, those that stop let go of their blocks before
    those that are at their length, and the order of release decides which block is evicted first. Leaps know neither stops
    nor several samples, so a run with either is replayed step by step.
    """

    def __init__(
        self,
        trace: Trace,
        scheduler: Scheduler,
        cost_model: CostModel,
        log: RequestLog,
        *,
        requests: RecordedRequests,
        leaps: bool = True,
    ) -> None:
        has_stops = requests.has_stopped & (requests.sample_tokens > 0)
        self._is_plain = not (has_stops.any() or (requests.num_samples > 1).any())
        super().__init__(trace, scheduler, cost_model, log, leaps=leaps and self._is_plain)
        self._requests = requests
        self._first_sample = np.cumsum(requests.num_samples) - requests.num_samples
        self._has_stops: NDArray[np.bool_] = np.logical_or.reduceat(has_stops, self._first_sample)
        self._sample_of_row: NDArray[np.int64] = np.zeros(64, np.int64)
        self._stop_at: NDArray[np.int64] = np.full(64, NEVER)
        """Number of known tokens at which the sample in a row stops by a stop token."""
        self._last_sample_token_s = np.full(len(requests.sample_tokens), np.nan)

    def _request(self, index: int) -> Request:
        requests = self._requests
        return dataclasses.replace(
            super()._request(index),
            # What was aborted before its first token is computed like a prompt that wants none.
            max_new_tokens=int(requests.max_new_tokens[index]) if self.trace.output_tokens[index] else 0,
            n=int(requests.num_samples[index]),
            priority=float(requests.priority[index]),
            reads_cache=bool(requests.reads_cache[index]),
            stop_token_ids=(STOP_TOKEN,) if self._has_stops[index] else (),
        )

    def _note_admitted(self, plan: StepPlan) -> None:
        super()._note_admitted(plan)
        if self._is_plain:
            return
        for row, request_id, sample_idx in plan.admitted:
            index = int(request_id)
            if row >= len(self._stop_at):
                self._sample_of_row = np.resize(self._sample_of_row, 2 * row)
                self._stop_at = np.resize(self._stop_at, 2 * row)
            sample = int(self._first_sample[index]) + sample_idx
            self._sample_of_row[row] = sample
            self._stop_at[row] = NEVER
            if self._requests.has_stopped[sample]:
                self._stop_at[row] = self.trace.prompt_tokens[index] + self._requests.sample_tokens[sample]

    def _sampled_tokens(self, plan: StepPlan) -> Int32s | None:
        if self._is_plain:
            return None
        rows = plan.sampling_rows
        num_known = self._scheduler.manager.memory.sequences.num_known[rows] + 1
        return np.where(num_known >= self._stop_at[rows], STOP_TOKEN, STOP_TOKEN + 1).astype(np.int32)

    def _note_tokens(self, rows: Rows, end: float) -> None:
        if self._is_plain:
            super()._note_tokens(rows, end)
            return
        samples = self._sample_of_row[rows]
        gaps = end - self._last_sample_token_s[samples]
        is_first = np.isnan(gaps)
        self.log.first_token_s[self._request_of_row[rows[is_first]]] = end
        if not is_first.all():
            self.gaps.add(gaps[~is_first])
        self._last_sample_token_s[samples] = end


def replay_run(
    record: RunRecord,
    cost_model: StepCosts | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    sink: EventSink | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Replay a recorded run; the steps take as long as `cost_model` says.

    `options` are fields of ReplayConfig that differ from the recorded ones. Without a cost model, step times are those of
    the model and device among `options`, or else of a fit to this very run. Deterministic.

    Raises ConfigError, with nothing done, for contradictions, and InvalidArgumentError for too few steps to fit.
    """
    started = time.perf_counter()
    options = dict(options or {})
    config = ReplayConfig(**options)
    trace = scale_arrivals(record.trace, config.rate_scale)
    engine = _engine_of(record, config, options, cost_model)
    require_matching_blocks(trace, engine.cache.block_size)
    log = RequestLog.empty(len(trace))
    tee = EventTee(log, sink)
    simulator = RecordedSimulator(
        trace,
        engine.make_scheduler(tee),
        engine.cost_model,
        log,
        requests=record.requests,
        leaps=config.leaps,
    )
    simulator.run(progress, checks=config.checks)
    described = {**_describe_hardware(record, config, options, cost_model), **_describe(record, engine, options)}
    return make_run(simulator, tee, described, engine.cache.num_blocks, time.perf_counter() - started)


def _engine_of(
    record: RunRecord, config: ReplayConfig, options: dict[str, Any], cost_model: StepCosts | None
) -> VirtualEngine:
    header = record.header
    cache = dataclasses.replace(header.cache, **{name: options[name] for name in CACHE_OPTIONS if name in options})
    hardware_options = [name for name in HARDWARE_OPTIONS if name in options]
    if hardware_options and cost_model is not None:
        raise ConfigError("model and device say how long a step takes, and so does the cost model: give one of the two")
    if hardware_options and "model" not in options and "device" not in options:
        names = " and ".join(hardware_options)
        raise ConfigError(f"{names} cannot change step times that are fitted to the run: give model or device, too")
    if hardware_options:
        model, device, hardware = hardware_of(config, cache.block_size)
        cost_model = RooflineCostModel(model, device, **hardware)
    elif cost_model is None:
        cost_model = fit_steps(record.steps.load, record.steps.end_s - record.steps.start_s).model
    limits = {name: options[name] for name in LIMIT_OPTIONS if name in options}
    policy, victim = order_named(config.policy) if "policy" in options else (header.policy, header.victim)
    preemption = header.preemption
    if "preemption" in options:
        preemption = preemption_named(config.preemption, cost_model)
        if not isinstance(preemption, Recompute) and not cache.num_host_blocks and "num_host_blocks" not in options:
            cache = dataclasses.replace(cache, num_host_blocks=cache.num_blocks)
    return VirtualEngine(
        cache=cache,
        eviction=options.get("eviction", header.eviction),
        scheduler=dataclasses.replace(header.scheduler, **limits),
        policy=policy,
        victim=victim,
        preemption=preemption,
        cost_model=cost_model,
    )


def _describe_hardware(
    record: RunRecord, config: ReplayConfig, options: dict[str, Any], cost_model: StepCosts | None
) -> dict[str, Any]:
    """What the step times are those of: the presets asked for, or the recorded machine; a cost model's file does not say."""
    if any(name in options for name in HARDWARE_OPTIONS):
        return {name: getattr(config, name) for name in HARDWARE_OPTIONS}
    facts = record.header.model if cost_model is None else {}
    return {"model": facts.get("name"), "device": facts.get("device")}


def _describe(record: RunRecord, engine: VirtualEngine, options: dict[str, Any]) -> dict[str, Any]:
    header = record.header
    return {
        "recorded_run": {"folder": record.folder.name, "model": header.model, "is_complete": header.is_complete},
        "changed_options": {name: value for name, value in options.items() if name not in OUTCOME_FREE_OPTIONS},
        "prefix_caching": engine.cache.prefix_caching,
        "eviction": engine.eviction,
        "policy": type(engine.policy).__name__,
        "victim": type(engine.victim).__name__,
        "preemption": type(engine.preemption).__name__,
        **dataclasses.asdict(engine.scheduler),
        "rate_scale": options.get("rate_scale", 1.0),
        **describe_engine(engine),
    }
