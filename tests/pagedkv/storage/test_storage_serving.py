"""A scheduler short of blocks, its plans carried out by storage: every token's K/V is where the block table says.

The model is a toy. The K/V of a token is made of all tokens before it, as int64 bits in float64 tensors, different in
each layer and tensor, NaNs among them. A slot that was never written, or was overwritten, spoils the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, StepPlan, Swap
from pagedkv.storage import KVSpec, KVStorage

VOCABULARY = 50
NUM_LAYERS = 2


def mix(state: int, token: int) -> int:
    return (state * 6364136223846793005 + token * 1442695040888963407 + 1) % 2**61


def answer_alone(prompt: list[int], num_new: int, sample_idx: int) -> list[int]:
    """What the toy model answers, computed without any cache."""
    state, answer = 0, []
    for token in prompt:
        state = mix(state, token)
    for _ in range(num_new):
        answer.append((state + sample_idx) % VOCABULARY)
        state = mix(state, answer[-1])
    return answer


def row_of(state: int, layer: int, tensor: int) -> torch.Tensor:
    """(2, 2): the bits that the token leaves in the two heads of one tensor; two of them are NaNs with payloads."""
    bits = state + 5 * layer + tensor
    return torch.tensor([[bits, ~(bits % 2**51)], [-bits, 0x7FF << 52 | bits % 2**51 + 1]])


@dataclass
class Service:
    """The loop of an engine; `num_…` counts what was moved."""

    scheduler: Scheduler
    storage: KVStorage
    seats: dict[int, tuple[str, int]] = field(default_factory=dict)
    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    num_swapped: int = 0
    num_copied: int = 0

    def tensors(self) -> list[tuple[int, int, torch.Tensor]]:
        views = ((self.storage.key_cache(layer), self.storage.value_cache(layer)) for layer in range(NUM_LAYERS))
        return [(layer, i, view.view(torch.int64)) for layer, pair in enumerate(views) for i, view in enumerate(pair)]

    def read(self, block_id: int, offset: int) -> int:
        """The state that all tensors of a slot agree on."""
        state = int(self.storage.key_cache(0).view(torch.int64)[block_id, offset, 0, 0])
        for layer, i, view in self.tensors():
            assert torch.equal(view[block_id, offset], row_of(state, layer, i)), "the slot holds something else"
        return state

    def run(self, plan: StepPlan) -> list[int]:
        self.seats |= {seat.row: (seat.request_id, seat.sample_idx) for seat in plan.admitted}
        self.storage.apply(plan)
        self.num_swapped += len(plan.swaps_in)
        self.num_copied += len(plan.copies)
        block_size = self.storage.spec.block_size
        states, packed = [], 0
        for row, num_tokens, start in zip(
            plan.rows.tolist(), plan.num_tokens.tolist(), plan.starts.tolist(), strict=True
        ):
            state = 0
            if start:
                block_id = int(self.scheduler.block_tables[row, (start - 1) // block_size])
                state = self.read(block_id, (start - 1) % block_size)
            for _ in range(num_tokens):
                state = mix(state, int(plan.token_ids[packed]))
                block_id, offset = divmod(int(plan.slot_mapping[packed]), block_size)
                for layer, i, view in self.tensors():
                    view[block_id, offset] = row_of(state, layer, i)
                packed += 1
            states.append(state)
        return [
            (states[source] + self.seats[row][1]) % VOCABULARY
            for source, row in zip(plan.sampling_sources.tolist(), plan.sampling_rows.tolist(), strict=True)
        ]

    def finish(self, plan: StepPlan, now: float) -> None:
        for output in self.scheduler.update(plan, self.run(plan), now).outputs:
            self.answers.setdefault((output.request_id, output.sample_idx), []).append(output.token_id)


def make_service(num_blocks: int, block_size: int, layout: str, prefix_caching: bool) -> Service:
    config = CacheConfig(num_blocks, block_size, num_host_blocks=40, prefix_caching=prefix_caching)
    scheduler = Scheduler(SchedulerConfig(16, 4), KVCacheManager(config), preemption=Swap())
    spec = KVSpec(NUM_LAYERS, 2, 2, dtype="float64", block_size=block_size)
    return Service(scheduler, KVStorage(spec, num_blocks, host_blocks=40, layout=layout))


def random_request(index: int, rng: np.random.Generator) -> Request:
    prompt = [1, 2, 3, 4, 5, 6, 7][: int(rng.integers(0, 8))] + rng.integers(0, 5, int(rng.integers(1, 9))).tolist()
    return Request(f"r{index}", prompt, int(rng.integers(4, 14)), n=1 if rng.random() < 0.6 else 2)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_every_answer_under_swapping_and_faults_is_the_one_it_would_get_alone(
    layout: str, prefix_caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_swapped = num_copied = num_failed = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        service = make_service(
            num_blocks=int(rng.integers(14, 20)), block_size=int(rng.integers(2, 4)), layout=layout,
            prefix_caching=prefix_caching,
        )  # fmt: skip
        scheduler = service.scheduler
        requests = [random_request(i, rng) for i in range(8)]
        for request in requests:
            scheduler.add(request, 0.0)
        for step in range(2000):
            if not scheduler.has_work:
                break
            plan = scheduler.schedule(float(step))
            if rng.random() < 0.15:
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "_foreach_copy_", _refuse)
                    try:
                        service.storage.apply(plan)
                    except RuntimeError:
                        num_failed += 1
                scheduler.fail(plan, float(step), "the copy failed")
                continue
            service.finish(plan, float(step))
            scheduler.check_invariants()

        for request in requests:
            for sample_idx in range(request.n):
                alone = answer_alone(list(request.prompt), request.max_new_tokens, sample_idx)
                assert service.answers[request.request_id, sample_idx] == alone
        num_swapped += service.num_swapped
        num_copied += service.num_copied
    assert min(num_swapped, num_copied, num_failed) > 10


def _refuse(*arguments: object, **options: object) -> None:
    raise RuntimeError("the device is gone")
