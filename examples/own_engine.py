"""An engine of one's own: a small transformer served by pagedkv's scheduler, storage and op. No transformers library."""

import numpy as np
import torch
from torch.nn import functional

from pagedkv import CacheConfig, KVCacheManager, KVSpec
from pagedkv.attention import paged_attention, plan, write_kv
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, StepPlan, Swap
from pagedkv.storage import KVStorage

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY, BLOCK_SIZE = 2, 4, 2, 32, 256, 4
torch.manual_seed(0)
embedding = torch.randn(VOCABULARY, HEADS * DIM)
projections = [torch.randn(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM) / 11 for _ in range(LAYERS)]
spec = KVSpec(LAYERS, KV_HEADS, DIM, dtype="float32", block_size=BLOCK_SIZE)


def run_model(step: StepPlan, block_tables: np.ndarray, storage: KVStorage) -> list[int]:
    """Compute the step's tokens, and return a next one for each of its sampling rows."""
    tasks = plan(step.seq_lens, step.query_start_loc, num_q_heads=HEADS, num_kv_heads=KV_HEADS)
    slots, *tables = map(torch.from_numpy, (step.slot_mapping, block_tables, step.seq_lens, step.query_start_loc))
    hidden = embedding[step.token_ids] + torch.from_numpy(step.positions)[:, None].sin()
    for layer, projection in enumerate(projections):
        heads = (functional.layer_norm(hidden, hidden.shape[1:]) @ projection).unflatten(1, (-1, DIM))
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        caches = storage.key_cache(layer), storage.value_cache(layer)
        write_kv(key, value, *caches, slots)
        hidden = hidden + paged_attention(query, *caches, *tables, plan=tasks).flatten(1)
    return (hidden[torch.from_numpy(step.logit_indices)] @ embedding.T).argmax(-1).tolist()


def generate(prompts: list[list[int]], num_new: int, num_blocks: int) -> tuple[list[list[int]], int]:
    """Greedy tokens of each prompt, and how many steps swapped somebody out."""
    storage = KVStorage(spec, num_blocks, host_blocks=64)
    manager = KVCacheManager(CacheConfig(num_blocks, BLOCK_SIZE, num_host_blocks=64))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=32, max_num_running=8), manager, preemption=Swap())
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(str(i), prompt, max_new_tokens=num_new), now=0.0)
    texts: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    num_steps = num_swapping = 0
    while scheduler.has_work:
        step = scheduler.schedule(now=float(num_steps))
        storage.apply(step)  # swaps out, copies on write, swaps in
        tokens = run_model(step, scheduler.block_tables[step.rows], storage) if step.num_rows else []
        for output in scheduler.update(step, tokens, now=float(num_steps)).outputs:
            texts[output.request_id].append(output.token_id)
        num_steps += 1
        num_swapping += len(step.swaps_out) > 0
    return list(texts.values()), num_swapping


if __name__ == "__main__":
    prompts = [[(7 * i + j) % VOCABULARY for j in range(10 + 3 * i)] for i in range(5)]
    together, num_swapping = generate(prompts, num_new=20, num_blocks=24)  # too few blocks for all of them
    alone = [generate([prompt], num_new=20, num_blocks=24)[0][0] for prompt in prompts]
    assert together == alone
    print(f"5 requests, 100 tokens, {num_swapping} steps swapped blocks out: the same tokens as one by one")
