"""Embed the memory manager and the scheduler around a model of your own: a queue of requests, served to the end."""

import time
from pathlib import Path

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import EventLog, Request, Scheduler, SchedulerConfig, StepPlan, Swap


class CountingModel:
    """Stands for a model: the next token is the length of the context."""

    def run(self, plan: StepPlan, block_tables) -> list[int]:
        """Compute one step: move blocks, write K/V to the plan's slots, read through the block tables, sample."""
        for name, copies in (("out", plan.swaps_out), ("copy", plan.copies), ("in", plan.swaps_in)):
            for source, target in zip(copies.sources, copies.targets, strict=True):
                print(f"  {name}: block {source} -> {target}")
        for row, num_tokens, start in zip(plan.rows, plan.num_tokens, plan.starts, strict=True):
            blocks = block_tables[row, : -(-(start + num_tokens) // 4)]
            print(f"  row {row}: tokens {start} to {start + num_tokens - 1} in blocks {blocks.tolist()}")
        return plan.seq_lens[plan.sampling_sources].tolist()


def main() -> None:
    """Serve three requests on a pool that is too small for all of them, swapping to the host."""
    manager = KVCacheManager(CacheConfig(num_blocks=8, block_size=4, num_host_blocks=8))
    with Path("events.jsonl").open("w", encoding="utf-8") as file:
        scheduler = Scheduler(SchedulerConfig(64, 4), manager, preemption=Swap(), sink=EventLog(file))
        for name in ("a", "b", "c"):
            scheduler.add(Request(name, [ord(name)] * 7, max_new_tokens=8), now=time.monotonic())
        model = CountingModel()
        while scheduler.has_work:
            plan = scheduler.schedule(now=time.monotonic())
            print(f"step {plan.step}")
            tokens = model.run(plan, scheduler.block_tables)
            for output in scheduler.update(plan, tokens, now=time.monotonic()).outputs:
                if output.finish_reason:
                    print(f"  {output.request_id} ended: {output.finish_reason}")
    print(f"every decision with its reason is in events.jsonl; blocks in use: {manager.statistics().num_used}")


if __name__ == "__main__":
    main()
