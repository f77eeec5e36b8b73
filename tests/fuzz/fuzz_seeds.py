"""Valid inputs of every parser: what fuzzing starts from."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

from pagedkv import CacheConfig, ExtraKey, KVCacheManager, KVSpec, SimulatedPrompt
from pagedkv.scheduler import (
    Cheaper,
    LowestPriority,
    Priority,
    Recorder,
    Request,
    Scheduler,
    SchedulerConfig,
    StepOutcome,
)

TRACES = [
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,9\r\n",
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n",
    b'arrival_s,client,prompt_tokens,output_tokens,hash_ids,hash_block_size\n0,a,5,1,"7 8",4\n1,b,9,1,7 9 10,4\n',
    (
        b'{"arrival_s":0.5,"prompt_tokens":5,"output_tokens":2,"client":"a","hash_block_size":4,"hash_runs":[[0,2]]}\n'
        b'{"arrival_s":1,"prompt_tokens":5,"output_tokens":2,"client":"b","hash_block_size":4,"hash_runs":[[0,1],[7,1]]}\n'
    ),
    b'{"timestamp": 0, "input_length": 513, "output_length": 500, "hash_ids": [0, 1]}\n',
    (
        b'{"chat_id":1,"parent_chat_id":-1,"timestamp":0.1,"input_length":17,"output_length":2,"type":"text","turn":1,'
        b'"hash_ids":[5,6]}\n'
    ),
    (
        b'{"id":"s","block_size":4,"hash_id_scope":"local","requests":[{"t":0.0,"in":9,"out":1,"runs":[[1,2]]},'
        b'{"t":2.0,"type":"subagent","requests":[{"t":0.5,"in":4,"out":0,"runs":[[8,1]]}]}]}\n'
    ),
]

RUN_HEADER = {
    "pagedkv_run": 1,
    "model": {"name": "toy"},
    "cache": {
        "num_blocks": 50,
        "block_size": 4,
        "num_host_blocks": 50,
        "prefix_caching": True,
        "identity": {"model": "", "kv_dtype": ""},
    },
    "eviction": "lru",
    "scheduler": {"max_num_batched_tokens": 32, "max_num_running": 8, "watermark": 0.0},
    "policy": {"name": "FCFS"},
    "victim": {"name": "LatestArrival"},
    "preemption": {"name": "Recompute"},
    "is_complete": True,
}
RUN_STEPS = (
    "start_s,end_s,num_rows,num_tokens,num_sampled,num_context_tokens,num_attention_pairs,num_copied_blocks,"
    "num_swapped_in_blocks,num_swapped_out_blocks,num_waiting,num_used_blocks\n"
    "0.02,0.03,1,6,2,6,21,0,0,0,0,2\n0.03,0.04,2,2,2,14,14,1,0,0,0,3\n"
)
RUN_TRACE = (
    '{"arrival_s":0.01,"prompt_tokens":6,"output_tokens":2,"hash_block_size":4,"hash_runs":[[0,1]],"request_id":"r",'
    '"max_new_tokens":5,"priority":2.0,"reads_cache":true,"samples":[{"reason":"stop","first_token_s":0.02,"end_s":0.04,'
    '"num_output_tokens":2,"num_preemptions":0}]}\n'
)
RUN_PARTS = b"\n=====\n"
"""Stands between the three files of a recorded run."""
RUNS = [RUN_PARTS.join([json.dumps(RUN_HEADER).encode(), RUN_STEPS.encode(), RUN_TRACE.encode()])]

CONFIGS = [
    {"CacheConfig": {"num_blocks": 8, "block_size": 16, "num_host_blocks": 4, "prefix_caching": True}},
    {"CacheIdentity": {"model": "llama", "kv_dtype": "fp8"}},
    {
        "KVSpec": {
            "num_layers": 2,
            "num_kv_heads": 2,
            "head_dim": 64,
            "dtype": "int4",
            "value_dim": 32,
            "is_latent": False,
        }
    },
    {
        "SchedulerConfig": {
            "max_num_batched_tokens": 64,
            "max_num_running": 8,
            "long_prefill_tokens": 16,
            "watermark": 0.5,
        }
    },
    {"Priority": {"ageing_per_s": 0.5}},
    {"Cheaper": {"prefill_s_per_token": 0.1, "transfer_s_per_block": 2}},
    {"ExtraKey": {"start": 0, "stop": 4, "digest": "x"}},
    {"SimulatedPrompt": {"num_tokens": 9, "content_ids": [1, 2], "content_block_size": 4}},
    {"Request": {"request_id": "a", "prompt": [1, 2], "max_new_tokens": 3, "priority": 1.5, "client": "c", "n": 2}},
    {
        "Request": {
            "request_id": "a",
            "prompt": [1],
            "max_new_tokens": 3,
            "stop_token_ids": [7],
            "adapter": "l",
            "salt": "s",
        }
    },
]


def recordings() -> list[bytes]:
    """Two short services, one of them with drafts, salts, items, swaps and a failed step."""
    file = io.StringIO()
    scheduler = Recorder(
        Scheduler(
            SchedulerConfig(32, 4, watermark=0),
            KVCacheManager(CacheConfig(6, 4, 6)),
            policy=Priority(0.5),
            victim=LowestPriority(),
            preemption=Cheaper(1.0, 2.0),
        ),
        file,
    )
    scheduler.add(Request("a", [1] * 7, 8, salt=b"\x00s", adapter="x", extras=(ExtraKey(0, 3, b"i"),), n=2), 0.0)
    scheduler.add(Request("b", SimulatedPrompt(6, [1, 2], 4), 6, priority=2.0), 0.25)
    scheduler.fail(scheduler.schedule(1.0), 1.0, "lost")
    for step in range(4):
        plan = scheduler.schedule(1.0 + step)
        scheduler.update(plan, [step] * len(plan.sampling_rows), 1.5 + step)
    scheduler.abort("b", 9.0)
    drafts = io.StringIO()
    other = Recorder(Scheduler(SchedulerConfig(32, 4), KVCacheManager(CacheConfig(8, 2))), drafts)
    other.add(Request("a", [1, 2, 3], 9), 0.0)
    other.update(other.schedule(0.0), [7], 1.0)
    other.update(other.schedule(1.0, {0: [8, 9]}), StepOutcome([8, 5], [2], [False]), 2.0)
    return [file.getvalue().encode(), drafts.getvalue().encode()]


SAVED_SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=4, block_size=2)


def saved_blocks() -> list[bytes]:
    """A file of two blocks; needs torch."""
    import numpy as np

    from pagedkv.storage import KVStorage

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        KVStorage(SAVED_SPEC, 2).save_blocks(path, np.arange(2), num_tokens=3, metadata={"request": "é"})
        return [path.read_bytes()]
