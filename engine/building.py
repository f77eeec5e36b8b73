"""From a model and what a user wants of it to an engine that is ready to serve."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from pagedkv import CacheConfig, CacheIdentity, KVCacheManager
from pagedkv.arrays import as_int, cdiv
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.config import require_object
from pagedkv.engine.core import Engine
from pagedkv.engine.largest_step import LargestStep
from pagedkv.engine.memory_budget import as_bytes, can_measure, measure_budget, num_blocks_within
from pagedkv.engine.metrics import EngineMetrics
from pagedkv.engine.model import LayerShape, PagedModel, inspect_model
from pagedkv.engine.model.self_check import check_same_logits
from pagedkv.engine.observers import Observers
from pagedkv.engine.run_record import RunRecorder
from pagedkv.engine.speculation import Drafter
from pagedkv.engine.timeline import Timeline
from pagedkv.errors import ConfigError
from pagedkv.eviction import EvictionPolicy
from pagedkv.kv_spec import KVSpec
from pagedkv.scheduler import (
    Cheaper,
    PreemptionPolicy,
    QueuePolicy,
    Recompute,
    Scheduler,
    SchedulerConfig,
    Swap,
    VictimPolicy,
)
from pagedkv.storage import KVStorage

__all__ = ["build_engine", "max_length_of"]

MAX_METRIC_LENGTH = 131_072
"""Ends the histograms of tokens per request for a model that sets no limit."""
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


def build_engine(
    model: Any,
    tokenizer: Any,
    *,
    num_blocks: int | None,
    block_size: int,
    kv_memory: str | int | float | None,
    kv_dtype: str | None,
    swap_memory: str | int | None,
    scheduler_config: SchedulerConfig,
    prefix_caching: bool,
    eviction: EvictionPolicy | None,
    policy: QueuePolicy | None,
    victim: VictimPolicy | None,
    preemption: PreemptionPolicy | None,
    self_check: bool,
    drafter: Drafter | None,
    seed: int,
    timeline: str | Path | None,
    record: str | Path | None,
    clock: Callable[[], float],
) -> Engine:
    """See LLM, whose options these are. Raises UnsupportedModelError, ConfigError or MemoryBudgetError."""
    if num_blocks is not None and kv_memory is not None:
        raise ConfigError("num_blocks and kv_memory say the same thing twice: give one of them")
    if isinstance(preemption, Swap | Cheaper) and swap_memory is None:
        raise ConfigError(
            f"preemption {type(preemption).__name__} has no host memory to move to: give swap_memory, or use Recompute()"
        )
    if tokenizer is not None:
        require_object("tokenizer", tokenizer, "decode", "AutoTokenizer.from_pretrained(name)")
    if drafter is not None:
        require_object("drafter", drafter, "propose", "NgramDrafter()")
    for name, place in (("timeline", timeline), ("record", record)):
        if not isinstance(place, str | PathLike | None):
            raise ConfigError(f"{name} must be a path, found one of type {type(place).__name__}")
    if not callable(clock):
        raise ConfigError(f"clock must be a function such as time.monotonic, found one of type {type(clock).__name__}")
    model.eval()
    layers = inspect_model(model)
    if self_check:
        check_same_logits(model, layers)
    spec = layers[0].kv_spec(len(layers), kv_dtype or dtype_name(model.dtype), block_size)
    if num_blocks is None:
        # What other drafters guess at most, nobody knows.
        num_drafts = 0 if drafter is None else getattr(drafter, "num_drafts", None)
        num_blocks = _affordable_blocks(model, layers, spec, kv_memory, scheduler_config, num_drafts)
    num_host_blocks = 0 if swap_memory is None else num_blocks_within(spec, as_bytes("swap_memory", swap_memory))
    if preemption is None:
        preemption = Swap() if num_host_blocks else Recompute()
    cache = CacheConfig(
        as_int("num_blocks", num_blocks, at_least=1, at_most=MAX_NUM_BLOCKS),
        block_size,
        num_host_blocks=num_host_blocks,
        prefix_caching=prefix_caching,
        identity=CacheIdentity(model=type(model).__name__),
    )
    manager = KVCacheManager(cache, eviction=eviction)
    observers = Observers(EngineMetrics(max_model_len=max_length_of(model) or MAX_METRIC_LENGTH))
    scheduler = Scheduler(
        scheduler_config, manager, policy=policy, victim=victim, preemption=preemption, sink=observers
    )
    storage = KVStorage(spec, num_blocks, next(model.parameters()).device, num_host_blocks)
    engine = Engine(
        PagedModel(model, layers, storage),
        scheduler,
        storage,
        tokenizer=tokenizer,
        end_token_ids=end_token_ids_of(model),
        observers=observers,
        drafter=drafter,
        max_length=max_length_of(model),
        seed=seed,
        clock=clock,
    )
    # Last, when nothing else can fail: what an earlier run left must not be lost to a construction that comes to nothing.
    if timeline is not None:
        Path(timeline).open("a").close()
    if record is not None:
        observers.recorder = RunRecorder(record, scheduler, model=_facts(model, spec), origin_s=clock())
    if timeline is not None:
        observers.timeline = Timeline(timeline)
        observers.timeline.watch(scheduler)
    return engine


def _facts(model: Any, spec: KVSpec) -> dict[str, str | int]:
    """What a recorded run says of the model, for people."""
    return {
        "name": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_dtype": spec.dtype,
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which KVSpec knows a model's dtype. Raises ConfigError."""
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"keys and values of {dtype} cannot be cached as they are: give kv_dtype")
    return DTYPE_NAMES[dtype]


def end_token_ids_of(model: Any) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config, or else of the model's."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def max_length_of(model: Any) -> int | None:
    """Positions that the model knows, or None if it sets no limit. A model whose rotary factors depend on the longest
    sequence of a batch ends where they would begin to.
    """
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        length = original or length
    return None if length is None else int(length)


def _affordable_blocks(
    model: Any,
    layers: list[LayerShape],
    spec: KVSpec,
    kv_memory: str | int | float | None,
    config: SchedulerConfig,
    num_drafts: int | None,
) -> int:
    """Blocks that fit into what was granted, as measured; without a grant no more than full seats of full length need.

    Bytes are taken at their word where nothing can be measured.
    """
    device = next(model.parameters()).device
    if isinstance(kv_memory, str | int) and not can_measure(device):
        return min(num_blocks_within(spec, as_bytes("kv_memory", kv_memory)), MAX_NUM_BLOCKS)
    max_length = max_length_of(model)
    largest = LargestStep(
        PagedModel(model, layers, KVStorage(spec, 1, device)),
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_running=config.max_num_running,
        max_length=max_length,
        num_drafts=num_drafts,
    )
    budget = measure_budget(device, largest)
    num_blocks = min(num_blocks_within(spec, budget.granted(kv_memory, device.type)), MAX_NUM_BLOCKS)
    if kv_memory is None and max_length is not None:
        num_blocks = min(num_blocks, config.max_num_running * cdiv(max_length, spec.block_size))
    return num_blocks
