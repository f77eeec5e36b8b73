"""What comes: a few requests that ask for far more than there is, and what goes wrong meanwhile. All of it from one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import cdiv
from pagedkv.content import SimulatedPrompt
from pagedkv.scheduler import Request
from pagedkv.testing.soak.fault_sources import RATES
from pagedkv.testing.soak.settings import Fault, FaultKind, Service, draw_service

__all__ = ["Overload", "draw_overload"]

NUM_STEPS = 14
KINDS = tuple(FaultKind)


@dataclass(frozen=True, slots=True)
class Overload:
    """Requests by the step before which they come, and the faults of the first `num_steps` steps; then there are none."""

    seed: int
    service: Service
    arrivals: tuple[tuple[int, Request], ...]
    faults: tuple[Fault, ...]
    num_steps: int = NUM_STEPS

    def only(self, requests: Iterable[int], faults: Iterable[int]) -> Overload:
        """The same with these requests and faults alone, by their numbers. Raises IndexError for those it has not."""
        return dataclasses.replace(
            self,
            arrivals=tuple(self.arrivals[i] for i in requests),
            faults=tuple(self.faults[i] for i in faults),
        )


def draw_overload(seed: int) -> Overload:
    """Draw everything from one seed. About twelve requests on memory that holds three of them."""
    rng = np.random.default_rng(seed)
    service = draw_service(rng)
    num_requests = int(rng.integers(8, 17))
    arrivals = sorted(rng.integers(0, NUM_STEPS, num_requests).tolist())
    requests = [_draw_request(i, service, rng) for i in range(num_requests)]
    return Overload(seed, service, tuple(zip(arrivals, requests, strict=True)), _draw_faults(rng))


def _draw_request(number: int, service: Service, rng: np.random.Generator) -> Request:
    kinds = rng.random(4)
    num_slots = service.cache.num_blocks * service.cache.block_size
    num_new = 0 if kinds[0] < 0.05 else int(rng.integers(1, 24))
    num_prompt = int(rng.integers(1, 48))
    if kinds[1] < 0.05:  # All that there is, to the last slot: the K/V of the last token is never needed.
        num_prompt = num_slots + 1 - max(num_new, 1)
    elif kinds[1] < 0.1:  # One slot more than there is.
        num_prompt = num_slots + 2 - max(num_new, 1)
    ids: list[int] = []
    if kinds[2] < 0.6:  # A beginning that others share, then blocks of its own.
        num_ids, family = cdiv(num_prompt, service.cache.block_size), int(rng.integers(3))
        num_shared = min(int(rng.integers(1, 8)), num_ids)
        own = 10_000 * (number + 1)
        ids = [*range(1000 * family, 1000 * family + num_shared), *range(own, own + num_ids - num_shared)]
    return Request(
        f"r{number}",
        SimulatedPrompt(num_prompt, ids, service.cache.block_size if ids else 0),
        num_new,
        n=int(rng.integers(2, 4)) if kinds[3] < 0.15 else 1,
        priority=float(rng.integers(3)),
        client=int(rng.integers(2)),
    )


def _draw_faults(rng: np.random.Generator) -> tuple[Fault, ...]:
    """Between none and ten, at most one of a kind in a step; each with a detail from the range of its kind."""
    num_faults = int(rng.integers(0, 11))
    drawn = {(int(rng.integers(NUM_STEPS)), KINDS[int(rng.integers(len(KINDS)))]) for _ in range(num_faults)}
    faults = []
    for step, kind in sorted(drawn, key=lambda fault: (fault[0], KINDS.index(fault[1]))):
        _, low, high = RATES[kind]
        faults.append(Fault(step, kind, int(rng.integers(low, high))))
    return tuple(faults)
