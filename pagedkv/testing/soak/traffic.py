"""Who comes when, and what they ask for: bursts and lulls, shared beginnings, long and short answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import cdiv
from pagedkv.content import SimulatedPrompt
from pagedkv.scheduler import Request
from pagedkv.testing.scheduler_shadow import VOCABULARY, Answer, answers_to
from pagedkv.testing.soak.settings import Service

__all__ = ["Traffic", "Wish", "fits_alone", "num_prompt_tokens"]

WAVE_S = 600.0
# Requests per second; the fake service gets through one to two.
RATES = (0.15, 0.8, 1.5, 4.0)


@dataclass(slots=True)
class Wish:
    """A request, what it must answer, and when the engine ends it."""

    request: Request
    answers: list[Answer]
    stops_after: int
    arrival_s: float


def num_prompt_tokens(request: Request) -> int:
    """Length of the prompt, simulated or not."""
    prompt = request.prompt
    return prompt.num_tokens if isinstance(prompt, SimulatedPrompt) else len(np.asarray(prompt))


def fits_alone(request: Request, service: Service) -> bool:
    """Whether the request could run if nobody else were there: the arithmetic done apart from the scheduler's own."""
    num_prompt = num_prompt_tokens(request)
    # The last token is sampled, and its K/V never needed.
    num_slots = num_prompt + max(request.max_new_tokens, 1) - 1
    config, cache = service.scheduler, service.cache
    num_blocks, num_seats = cdiv(num_slots, cache.block_size), request.n
    most_blocks, most_seats = cache.num_blocks, config.max_num_running
    if config.client_share is not None:
        num_blocks *= request.n
        most_blocks = int((most_blocks - int(config.watermark * most_blocks)) * config.client_share)
        most_seats = max(int(most_seats * config.client_share), 1)
    return (
        num_blocks <= most_blocks
        and num_seats <= most_seats
        and (config.chunked_prefill or num_slots <= config.max_num_batched_tokens)
    )


class Traffic:
    """Draws requests in order of arrival. The rate changes every ten minutes; beginnings are shared as in chats."""

    def __init__(self, service: Service, rng: np.random.Generator) -> None:
        self._service = service
        self._rng = rng
        self._prefixes = [rng.integers(0, VOCABULARY, int(rng.integers(2, 40))).tolist() for _ in range(6)]
        self._num_drawn = 0
        self._rate = RATES[1]
        self._wave_ends_s = 0.0
        self.next_arrival_s = 0.0

    def draw(self) -> Wish:
        """The request that arrives at `next_arrival_s`; then the time of the next one is drawn."""
        rng, arrival_s = self._rng, self.next_arrival_s
        wish = self._wish(f"r{self._num_drawn}", arrival_s)
        self._num_drawn += 1
        if arrival_s >= self._wave_ends_s:
            self._rate = RATES[int(rng.integers(len(RATES)))]
            self._wave_ends_s = arrival_s + WAVE_S
        self.next_arrival_s = arrival_s + float(rng.exponential(1 / self._rate))
        return wish

    def _wish(self, request_id: str, arrival_s: float) -> Wish:
        rng = self._rng
        kinds = rng.random(6)
        prompt = [] if kinds[0] < 0.3 else list(self._prefixes[int(rng.integers(len(self._prefixes)))])
        prompt += rng.integers(0, VOCABULARY, int(rng.integers(1, 12))).tolist()
        num_new = 0 if kinds[1] < 0.03 else int(rng.integers(1, 24))
        if kinds[2] < 0.01:  # More than can ever fit.
            prompt *= 100
        elif kinds[2] < 0.02:  # All that there is, to the last slot; the K/V of the last token is never needed.
            num_slots = self._service.cache.num_blocks * self._service.cache.block_size
            prompt = (prompt * num_slots)[: num_slots + 1 - max(num_new, 1)]
        request = Request(
            request_id,
            prompt,
            num_new,
            n=int(rng.integers(2, 4)) if kinds[3] < 0.1 else 1,
            stop_token_ids=rng.integers(0, VOCABULARY, 2).tolist() if kinds[4] < 0.2 else (),
            priority=float(rng.integers(3)),
            client=int(100 * kinds[3]) % 2,
            salt=b"tenant" if kinds[5] < 0.2 else b"",
            adapter="lora" if 0.15 < kinds[5] < 0.3 else None,
            reads_cache=bool(kinds[5] < 0.95),
        )
        stops_after = int(rng.integers(1, 10)) if kinds[5] > 0.9 else 10_000
        answers = answers_to(request, stops_after=stops_after) if fits_alone(request, self._service) else []
        return Wish(request, answers, stops_after, arrival_s)
