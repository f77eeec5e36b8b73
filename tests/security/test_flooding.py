"""S9: a client that floods slows another by at most what its share may compute first. `pytest -s` tells by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from pagedkv import CacheConfig, KVCacheManager, SimulatedPrompt
from pagedkv.arrays import cdiv
from pagedkv.scheduler import QueueFullError, Request, Scheduler, SchedulerConfig

BLOCK_SIZE, NUM_BLOCKS, BUDGET, SEATS = 4, 100, 64, 16


class Service:
    """A scheduler, and how many steps each request of the victim took from its arrival to its end."""

    def __init__(self, share: float | None, **limits: object) -> None:
        config = SchedulerConfig(BUDGET, SEATS, client_share=share, **limits)
        self.scheduler = Scheduler(config, KVCacheManager(CacheConfig(NUM_BLOCKS, BLOCK_SIZE)))
        self.step_idx = 0
        self.came_at: dict[str, int] = {}
        self.num_steps: dict[str, int] = {}
        self.most_seats: Counter[object] = Counter()
        self.most_blocks: Counter[object] = Counter()

    def add(self, request: Request) -> None:
        self.came_at[request.request_id] = self.step_idx
        self.scheduler.add(request, float(self.step_idx))

    def step(self) -> None:
        plan = self.scheduler.schedule(float(self.step_idx))
        self._look()
        for request_id in self.scheduler.update(plan, None, float(self.step_idx)).finished_ids:
            self.num_steps[request_id] = self.step_idx + 1 - self.came_at[request_id]
        self.step_idx += 1

    def _look(self) -> None:
        """Count from the tables what each client holds."""
        scheduler = self.scheduler
        rows = scheduler.running_rows
        clients = [sample.request.client for sample in scheduler._running.samples[rows]]
        blocks: Counter[object] = Counter()
        for client, count in zip(clients, scheduler.manager.memory.sequences.num_blocks[rows].tolist(), strict=True):
            blocks[client] += count
        self.most_seats |= Counter(clients)
        self.most_blocks |= blocks


def victims() -> Iterator[tuple[int, Request]]:
    """Now and then somebody asks for something small: at most two of these are there at once."""
    for i in range(20):
        yield 10 + 15 * i, Request(f"victim {i}", SimulatedPrompt(20), 12, client="victim")


def attack(number: int) -> Request:
    """Requests that are as large as one may be, and none like another."""
    return Request(f"attack {number}", SimulatedPrompt(1 + number * 37 % 120), 1 + number * 11 % 60, client="attacker")


def serve(share: float | None, *, num_attacks: int) -> Service:
    service = Service(share)
    for number in range(num_attacks):
        service.add(attack(number))
    arrivals = list(victims())
    while arrivals or any(id_.startswith("victim") for id_ in service.came_at if id_ not in service.num_steps):
        while arrivals and arrivals[0][0] <= service.step_idx:
            service.add(arrivals.pop(0)[1])
        service.step()
        if service.step_idx % 50 == 0:
            service.scheduler.check_invariants()
    return service


def slow_down(service: Service, alone: Service) -> tuple[int, float]:
    """By how many steps, and by which factor, the victim's requests took longer at most."""
    ids = [f"victim {i}" for i in range(20)]
    extra = max(service.num_steps[id_] - alone.num_steps[id_] for id_ in ids)
    return extra, max(service.num_steps[id_] / alone.num_steps[id_] for id_ in ids)


def test_a_flood_slows_another_client_by_no_more_than_the_flooders_share_takes_to_compute() -> None:
    alone = serve(0.5, num_attacks=0)
    flooded, unprotected = serve(0.5, num_attacks=1500), serve(None, num_attacks=1500)

    extra, factor = slow_down(flooded, alone)
    extra_without, factor_without = slow_down(unprotected, alone)
    print(
        f"\nlargest slow-down: {extra} steps, x {factor:.2f}; without shares {extra_without} steps, x {factor_without:.0f}"
    )
    # What has entered of the attacker stands before the victim's prompt, and beside it there is only decoding.
    num_slots = NUM_BLOCKS // 2 * BLOCK_SIZE
    assert extra <= cdiv(num_slots, BUDGET - SEATS)
    assert extra_without > 1000


def test_no_client_holds_more_than_its_share_and_a_flooder_gets_most_of_its_own() -> None:
    service = serve(0.5, num_attacks=300)

    assert service.most_seats["attacker"] <= SEATS // 2
    assert 35 <= service.most_blocks["attacker"] <= NUM_BLOCKS // 2
    assert service.most_blocks["victim"] == 8
    assert service.scheduler.num_waiting > 0


def test_a_flooder_that_fills_its_places_to_wait_leaves_another_its_own() -> None:
    service = Service(0.5, max_num_waiting=40)
    for number in range(20):
        service.add(attack(number))

    with pytest.raises(QueueFullError, match="20 requests of its client are here, no more may be"):
        service.add(attack(20))
    for i in range(20):
        service.add(Request(f"victim {i}", SimulatedPrompt(20), 12, client="victim"))
    with pytest.raises(QueueFullError):
        service.add(Request("victim 20", SimulatedPrompt(20), 12, client="victim"))


def test_three_floods_at_once_leave_a_fourth_client_its_quarter() -> None:
    alone, flooded = Service(0.25), Service(0.25)
    for number in range(600):
        flooded.add(Request(f"a{number}", SimulatedPrompt(30), 40, client=number % 3))
    for service in (alone, flooded):
        for _ in range(40):
            service.step()
        service.add(Request("victim", SimulatedPrompt(50), 30, client="victim"))
        while "victim" not in service.num_steps:
            service.step()

    # Its prompt is computed beside the others' decoding, at the first opportunity.
    assert flooded.num_steps["victim"] - alone.num_steps["victim"] <= 1
