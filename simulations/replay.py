"""Replay a trace on a configured virtual engine: the main job, as one call."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagedkv import CacheConfig, ConfigError, InvalidArgumentError, KVCacheManager, __version__
from pagedkv.eviction import make_policy
from pagedkv.scheduler import (
    FCFS,
    Cheaper,
    EventSink,
    LatestArrival,
    LowestPriority,
    PreemptionPolicy,
    Priority,
    QueuePolicy,
    Recompute,
    Scheduler,
    SchedulerConfig,
    Swap,
    VictimPolicy,
)
from pagedkv.simulations.cost_models import (
    DeviceSpec,
    LinearCostModel,
    ModelSpec,
    RooflineCostModel,
    get_device,
    get_model,
    num_kv_blocks,
)
from pagedkv.simulations.run import RequestLog, Run
from pagedkv.simulations.simulator import EventTee, Simulator
from pagedkv.simulations.traces import Trace, limits

__all__ = ["HARDWARE_OPTIONS", "ReplayConfig", "StepCosts", "VirtualEngine", "replay"]

HARDWARE_OPTIONS = ("model", "device", "num_devices", "weight_bits", "kv_bits")
"""Fields of ReplayConfig that name presets and how the model lies on the devices."""
DEFAULT_BLOCK_SIZE = 16
PREEMPTIONS = ("recompute", "swap", "cheaper")

StepCosts = RooflineCostModel | LinearCostModel
"""Cost models that also tell what recomputing and swapping cost."""


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """What to replay a trace on.

    weight_bits, kv_bits: of the model's weights and of its K/V
    block_size:      tokens per block; None: the trace's own if it names shared blocks, else 16
    num_blocks:      device blocks; None: what the device's memory leaves beside the weights
    num_host_blocks: blocks for swapping; None: as many as on the device if `preemption` may swap, else 0
    rate_scale:      2 lets requests arrive twice as fast
    leaps:           whether runs of identical decode steps are taken at once; the outcome is the same
    checks:          whether every invariant is recounted after each 1,000 plans
    The others are those of SchedulerConfig, of the cost model's presets, and the names of policies. Raises ConfigError or
    InvalidArgumentError for a name that nothing has; numbers are checked by what takes them, in `replay`.
    """

    model: str = "Llama-3-8B"
    device: str = "H100"
    num_devices: int = 1
    weight_bits: int = 16
    kv_bits: int = 16
    block_size: int | None = None
    num_blocks: int | None = None
    num_host_blocks: int | None = None
    prefix_caching: bool = True
    eviction: str = "lru"
    policy: str = "fcfs"
    preemption: str = "recompute"
    max_num_batched_tokens: int = 8192
    max_num_running: int = 256
    long_prefill_tokens: int | None = None
    admission_interval: int = 1
    chunked_prefill: bool = True
    watermark: float = 0.01
    max_bypasses: int = 4
    max_preemptions: int = 8
    client_share: float | None = None
    rate_scale: float = 1.0
    leaps: bool = True
    checks: bool = False

    def __post_init__(self) -> None:
        get_model(self.model)
        get_device(self.device)
        make_policy(self.eviction, 1)
        order_named(self.policy)
        if self.preemption not in PREEMPTIONS:
            raise ConfigError(f"preemption must be one of {', '.join(PREEMPTIONS)}, found {self.preemption!r}")


@dataclass(frozen=True, slots=True, eq=False)
class VirtualEngine:
    """What a trace is replayed on: sizes, limits, policies, and how long a step takes."""

    cache: CacheConfig
    eviction: str
    scheduler: SchedulerConfig
    policy: QueuePolicy
    victim: VictimPolicy
    preemption: PreemptionPolicy
    cost_model: StepCosts

    def make_scheduler(self, sink: EventSink) -> Scheduler:
        """A scheduler of this kind, with empty memory."""
        manager = KVCacheManager(self.cache, eviction=make_policy(self.eviction, self.cache.num_blocks))
        return Scheduler(
            self.scheduler, manager, policy=self.policy, victim=self.victim, preemption=self.preemption, sink=sink
        )


def replay(
    trace: Trace,
    config: ReplayConfig | None = None,
    *,
    cost_model: StepCosts | None = None,
    sink: EventSink | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Replay `trace` and return everything that happened; `sink` gets the scheduler's events as they come.

    `cost_model` says how long steps take; by default the roofline of `config`'s model and device, which otherwise only say
    how many blocks there are, and nothing if `config` says that, too. `progress` gets the number of ended requests now and
    then. Deterministic: same trace and configuration, same run, apart from `wall_s`. Raises InvalidArgumentError for what is
    no trace and ConfigError for contradictions, with nothing done.

    >>> from pagedkv.simulations.traces import sample_trace
    >>> run = replay(sample_trace().head(10))
    >>> int((run.requests.num_output > 0).sum())
    10
    """
    started = time.perf_counter()
    if not isinstance(trace, Trace):
        raise InvalidArgumentError(f"trace must be a Trace, found a {type(trace).__name__}: load_trace(path) reads one")
    config = ReplayConfig() if config is None else config
    trace = scale_arrivals(trace, config.rate_scale)
    engine = _engine_of(trace, config, cost_model)
    log = RequestLog.empty(len(trace))
    tee = EventTee(log, sink)
    simulator = Simulator(trace, engine.make_scheduler(tee), engine.cost_model, log, leaps=config.leaps)
    simulator.run(progress, checks=config.checks)
    described = {**dataclasses.asdict(config), "session_gap_s": trace.session_gap_s, **describe_engine(engine)}
    if cost_model is not None and config.num_blocks is not None:
        described |= dict.fromkeys(HARDWARE_OPTIONS)
    return make_run(simulator, tee, described, engine.cache.num_blocks, time.perf_counter() - started)


def describe_engine(engine: VirtualEngine) -> dict[str, Any]:
    """What a report says of an engine whose options it knows: what they came to, and the cost model."""
    return {
        "block_size": engine.cache.block_size,
        "num_blocks": engine.cache.num_blocks,
        "num_host_blocks": engine.cache.num_host_blocks,
        "cost_model": engine.cost_model.describe(),
        "pagedkv_version": __version__,
    }


def make_run(simulator: Simulator, tee: EventTee, configuration: dict[str, Any], num_blocks: int, wall_s: float) -> Run:
    """Everything that a finished simulation leaves."""
    return Run(
        trace=simulator.trace,
        configuration=configuration,
        requests=simulator.log,
        steps=simulator.steps,
        gaps=simulator.gaps,
        preemptions=tee.preemptions,
        rejections=simulator.rejections,
        num_blocks=num_blocks,
        wall_s=wall_s,
    )


def _engine_of(trace: Trace, config: ReplayConfig, cost_model: StepCosts | None) -> VirtualEngine:
    block_size = config.block_size
    if block_size is None:
        block_size = trace.content_block_size or DEFAULT_BLOCK_SIZE
    require_matching_blocks(trace, block_size)
    num_blocks = config.num_blocks
    if cost_model is None or num_blocks is None:
        model, device, hardware = hardware_of(config, block_size)
        cost_model = RooflineCostModel(model, device, **hardware) if cost_model is None else cost_model
        num_blocks = num_kv_blocks(model, device, **hardware) if num_blocks is None else num_blocks
    policy, victim = order_named(config.policy)
    preemption = preemption_named(config.preemption, cost_model)
    num_host_blocks = config.num_host_blocks
    if num_host_blocks is None:
        num_host_blocks = 0 if isinstance(preemption, Recompute) else num_blocks
    return VirtualEngine(
        cache=CacheConfig(num_blocks, block_size, num_host_blocks, config.prefix_caching),
        eviction=config.eviction,
        scheduler=SchedulerConfig(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_running=config.max_num_running,
            long_prefill_tokens=config.long_prefill_tokens,
            admission_interval=config.admission_interval,
            chunked_prefill=config.chunked_prefill,
            watermark=config.watermark,
            max_bypasses=config.max_bypasses,
            max_preemptions=config.max_preemptions,
            client_share=config.client_share,
        ),
        policy=policy,
        victim=victim,
        preemption=preemption,
        cost_model=cost_model,
    )


def hardware_of(config: ReplayConfig, block_size: int) -> tuple[ModelSpec, DeviceSpec, dict[str, Any]]:
    """The presets that a configuration names, and how the model lies on the devices. Raises ConfigError."""
    hardware: dict[str, Any] = {
        "block_size": block_size,
        "num_devices": config.num_devices,
        "weight_bits": config.weight_bits,
        "kv_bits": config.kv_bits,
    }
    return get_model(config.model), get_device(config.device), hardware


def scale_arrivals(trace: Trace, rate_scale: float) -> Trace:
    """The trace with requests arriving `rate_scale` times as fast. Raises ConfigError."""
    if not math.isfinite(rate_scale) or rate_scale <= 0:
        raise ConfigError(f"rate_scale must be a finite number > 0, found {rate_scale}")
    if len(trace) and float(trace.arrival_s[-1]) / rate_scale > limits.MAX_ARRIVAL_S:
        raise ConfigError(f"rate_scale {rate_scale} stretches the trace beyond {limits.MAX_ARRIVAL_S:g} s")
    return trace if rate_scale == 1 else dataclasses.replace(trace, arrival_s=trace.arrival_s / rate_scale)


def require_matching_blocks(trace: Trace, block_size: int) -> None:
    """Raise ConfigError for a block size that cuts through the blocks that the trace names."""
    named = trace.content_block_size
    if block_size < 1:
        raise ConfigError(f"block_size must be 1 or more, found {block_size}")
    if named is not None and named % block_size and block_size % named:
        raise ConfigError(
            f"block_size {block_size} does not fit the trace, which names shared blocks of {named} tokens: "
            f"choose a divisor or a multiple of {named}"
        )


def order_named(name: str) -> tuple[QueuePolicy, VictimPolicy]:
    """The policies that a name stands for. Raises ConfigError."""
    if name == "fcfs":
        return FCFS(), LatestArrival()
    if name == "priority":
        return Priority(), LowestPriority()
    raise ConfigError(f"policy must be one of fcfs, priority, found {name!r}")


def preemption_named(name: str, cost_model: StepCosts) -> PreemptionPolicy:
    """The policy that one of `PREEMPTIONS` stands for; `cost_model` tells it what is cheaper."""
    if name == "recompute":
        return Recompute()
    if name == "swap":
        return Swap()
    return Cheaper(cost_model.prefill_s_per_token, cost_model.swap_s_per_block)
