"""One attention layer served by the real parts: scheduler, block tables, storage and the op. No model, no weights to load.

The pool is too small for all requests, so some are swapped out and back: K/V move with them, and every token is attended
over exactly what was written for it. At the end the layer's output equals attention over the whole text, un-paged.
"""

import numpy as np
import torch
import torch.nn.functional as functional

from pagedkv import CacheConfig, KVCacheManager, KVSpec
from pagedkv.attention import paged_attention, plan, write_kv
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, Swap
from pagedkv.storage import KVStorage

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 64, 512
generator = torch.Generator().manual_seed(0)
embedding = torch.randn(VOCABULARY, HEADS + 2 * KV_HEADS, HEAD_DIM, generator=generator)  # stands for the projections


def generate(prompts: list[list[int]], num_new: int, num_blocks: int) -> tuple[dict[str, list[int]], int]:
    """Greedy tokens of each prompt, and how often a request was preempted."""
    spec = KVSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32", block_size=4)
    storage = KVStorage(spec, num_blocks, host_blocks=64)
    manager = KVCacheManager(CacheConfig(num_blocks, block_size=4, num_host_blocks=64))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=32, max_num_running=8), manager, preemption=Swap())
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(f"request {i}", prompt, max_new_tokens=num_new), now=0.0)
    texts: dict[str, list[int]] = {f"request {i}": [] for i in range(len(prompts))}
    num_preemptions, step = 0, 0
    while scheduler.has_work:
        work = scheduler.schedule(now=float(step))
        storage.apply(work)  # swaps out, copies, swaps in
        num_preemptions += len(work.swaps_out) > 0
        query, key, value = embedding[work.token_ids].split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        write_kv(key, value, storage.key_cache(0), storage.value_cache(0), torch.from_numpy(work.slot_mapping))
        tables = scheduler.block_tables[work.rows]
        lengths = work.seq_lens.astype(np.int32)
        tasks = plan(lengths, work.query_start_loc, num_q_heads=HEADS, num_kv_heads=KV_HEADS)
        out = paged_attention(
            query,
            storage.key_cache(0),
            storage.value_cache(0),
            *(torch.from_numpy(array) for array in (tables, lengths, work.query_start_loc)),
            plan=tasks,
        )
        tokens = next_tokens(out[torch.from_numpy(work.logit_indices)])
        for output in scheduler.update(work, tokens, now=float(step)).outputs:
            texts[output.request_id].append(output.token_id)
        step += 1
    return texts, num_preemptions


def next_tokens(attended: torch.Tensor) -> list[int]:
    """(n, HEADS, HEAD_DIM) to the token whose embedding it is most like."""
    scores = attended.flatten(1) @ embedding[:, :HEADS].flatten(1).T
    tokens: list[int] = scores.argmax(-1).tolist()
    return tokens


def generate_unpaged(prompt: list[int], num_new: int) -> list[int]:
    """The same layer on one sequence, its whole text computed anew for every token."""
    text = list(prompt)
    for _ in range(num_new):
        query, key, value = embedding[text].transpose(0, 1).split((HEADS, KV_HEADS, KV_HEADS))
        group = HEADS // KV_HEADS
        keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        text += next_tokens(out[:, -1:].transpose(0, 1))
    return text[len(prompt) :]


if __name__ == "__main__":
    prompts = [[(7 * i + j) % VOCABULARY for j in range(10 + 3 * i)] for i in range(5)]
    texts, num_preemptions = generate(prompts, num_new=20, num_blocks=24)
    assert all(texts[f"request {i}"] == generate_unpaged(prompt, 20) for i, prompt in enumerate(prompts))
    print(f"5 requests, 100 tokens, {num_preemptions} steps swapped blocks out; all tokens equal un-paged attention's")
