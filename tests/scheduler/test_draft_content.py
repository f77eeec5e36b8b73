"""Whatever is guessed, answers are those of the plain run, and every slot and every name holds what it says."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedkv import UnknownIdError
from pagedkv.scheduler import (
    Cheaper,
    EventLog,
    Recompute,
    Recorder,
    Request,
    SchedulerConfig,
    StepOutcome,
    Swap,
    replay_recording,
)

PREEMPTIONS = {"recompute": Recompute(), "swap": Swap(), "cheaper": Cheaper(1.0, 3.0)}
COMMON_PROMPT = [1, 2, 3, 4, 5, 6, 7]
NUM_REQUESTS = 7

scenarios = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "block_size": st.sampled_from([1, 2, 3, 4]),
        "num_blocks": st.integers(24, 40),
        "num_host_blocks": st.sampled_from([1, 8, 60]),
        "preemption": st.sampled_from(sorted(PREEMPTIONS)),
        "prefix_caching": st.sampled_from([True, True, False]),
        "budget": st.sampled_from([6, 12, 64]),
        "accuracy": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "fail_rate": st.sampled_from([0.0, 0.2]),
        "abort_rate": st.sampled_from([0.0, 0.05]),
    }
)


@dataclass
class Wish:
    """A request, when its engine stops it, and the answers that the plain run gives."""

    request: Request
    stops_after: int
    answers: list[list[int]] = field(default_factory=list)


def random_wish(index: int, rng: np.random.Generator, continue_prompt) -> Wish:
    prompt = COMMON_PROMPT[: int(rng.integers(0, 8))] + rng.integers(0, 5, int(rng.integers(1, 7))).tolist()
    num_new = int(rng.integers(0, 14))
    stops = rng.integers(0, 50, 2).tolist() if rng.random() < 0.4 else []
    num_samples = 1 if rng.random() < 0.7 else int(rng.integers(2, 4))
    request = Request(f"r{index}", prompt, num_new, n=num_samples, stop_token_ids=stops)
    wish = Wish(request, int(rng.integers(1, 12)) if rng.random() < 0.3 else 100)
    for sample_idx in range(num_samples):
        answer = continue_prompt(prompt, min(num_new, wish.stops_after), sample_idx)
        end = next((i for i, token in enumerate(answer, start=1) if token in stops), len(answer))
        wish.answers.append(answer[:end])
    return wish


class World:
    """The service under test, what it should answer, and what every slot should hold."""

    def __init__(self, service, wishes: dict[str, Wish], mix, rng: np.random.Generator, accuracy: float) -> None:
        self.service = service
        self.memory = service.engine.scheduler.manager.memory
        self.wishes = wishes
        self.mix = mix
        self.rng = rng
        self.accuracy = accuracy

    def guess(self) -> dict[int, list[int]]:
        """Drafts for some of the running rows, each token right with the given probability."""
        drafts = {}
        for row in self.service.engine.scheduler.running_rows.tolist():
            if row in self.service.engine.seats and self.rng.random() < 0.8:
                request_id, sample_idx = self.service.engine.seats[row]
                told = len(self.service.answers.get((request_id, sample_idx), []))
                right = self.wishes[request_id].answers[sample_idx][told:] + [0] * 7
                is_right = self.rng.random(int(self.rng.integers(0, 7))) < self.accuracy
                drafts[row] = [right[i] if known else 49 - right[i] for i, known in enumerate(is_right.tolist())]
        return drafts

    def outcome(self, plan) -> StepOutcome:
        """Run the model; end rows after as many tokens as their engine stops at."""
        raw = self.service.engine.run(plan)
        token_ids, counts = (raw.token_ids, raw.num_tokens) if isinstance(raw, StepOutcome) else (raw, [1] * len(raw))
        kept, lengths, stopped, first = [], [], [], 0
        for row, count in zip(plan.sampling_rows.tolist(), counts, strict=True):
            seat = self.service.engine.seats[row]
            left = self.wishes[seat[0]].stops_after - len(self.service.answers.get(seat, []))
            stopped.append(count >= left)
            lengths.append(max(1, min(count, left)))
            kept += token_ids[first : first + lengths[-1]]
            first += count
        return StepOutcome(kept, lengths, stopped)

    def states(self, tokens: list[int]) -> list[int]:
        states, state = [], 0
        for token in tokens:
            state = self.mix(state, token)
            states.append(state)
        return states

    def tokens(self, request_id: str, sample_idx: int) -> list[int]:
        return list(self.wishes[request_id].request.prompt) + self.service.answers.get((request_id, sample_idx), [])

    def check_read(self, plan) -> None:
        """Every position before a row's first computed one holds the K/V of exactly the tokens before it."""
        engine = self.service.engine
        for row, start in zip(plan.rows.tolist(), plan.starts.tolist(), strict=True):
            if self.memory.sequences.is_live[row]:  # Not aborted meanwhile.
                positions = np.arange(start)
                slots = self.memory.sequences.slots(np.full(start, row), positions)
                assert engine.device.reshape(-1)[slots].tolist() == self.states(self.tokens(*engine.seats[row]))[:start]

    def check_names(self) -> None:
        """Every named block holds the K/V of a block of tokens of that name, all of them tokens of a right answer."""
        block_size, cache = self.memory.block_size, self.memory.cache
        expected = {}
        for wish in self.wishes.values():
            for answer in wish.answers:
                tokens = list(wish.request.prompt) + answer
                states = self.states(tokens)
                content, num_tokens = self.service.engine.scheduler.manager.make_content(tokens)
                for i, key in enumerate(content.keys(num_tokens // block_size)[: num_tokens // block_size]):
                    expected[key] = states[i * block_size : (i + 1) * block_size]
        for key, block_id in cache._block_of.items():
            assert self.service.engine.device[block_id].tolist() == expected[key]

    def check_at_rest(self) -> None:
        self.service.engine.scheduler.check_invariants()
        assert not self.memory.sequences.num_drafts[self.memory.sequences.is_live].any()
        self.check_names()


@given(scenarios)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_with_drafts_are_those_without(make_service, scenario) -> None:
    rng = np.random.default_rng(scenario["seed"])
    log, recording = io.StringIO(), io.StringIO()
    service = make_service(
        SchedulerConfig(scenario["budget"], 5, watermark=0),
        num_blocks=scenario["num_blocks"] * 4 // scenario["block_size"] // 3,
        block_size=scenario["block_size"],
        num_host_blocks=scenario["num_host_blocks"],
        prefix_caching=scenario["prefix_caching"],
        preemption=PREEMPTIONS[scenario["preemption"]],
        sink=EventLog(log),
    )
    real = service.scheduler
    scheduler = service.scheduler = Recorder(real, recording)
    wishes: dict[str, Wish] = {}
    world = World(service, wishes, make_service.mix, rng, scenario["accuracy"])
    aborted: set[str] = set()
    for _ in range(3000):
        if len(wishes) < NUM_REQUESTS and rng.random() < 0.5:
            wish = random_wish(len(wishes), rng, make_service.continue_prompt)
            wishes[wish.request.request_id] = wish
            service.add(wish.request)
        elif not scheduler.has_work and len(wishes) == NUM_REQUESTS:
            break
        plan = scheduler.schedule(service.clock, world.guess())
        assert int(plan.num_tokens.sum()) <= scenario["budget"]
        real.check_invariants()
        if wishes and rng.random() < scenario["abort_rate"]:
            victim = f"r{rng.integers(len(wishes))}"
            try:
                scheduler.abort(victim, service.clock)
                aborted.add(victim)
            except UnknownIdError:
                pass
            real.check_invariants()
        if rng.random() < scenario["fail_rate"]:
            service.engine.seats |= {seat.row: (seat.request_id, seat.sample_idx) for seat in plan.admitted}
            service.engine.spoil(plan)
            scheduler.fail(plan, service.clock, "the device was lost")
        else:
            outcome = world.outcome(plan)
            world.check_read(plan)
            service.clock += 1.0
            for output in scheduler.update(plan, outcome, service.clock).outputs:
                service.answers.setdefault((output.request_id, output.sample_idx), []).append(output.token_id)
        world.check_at_rest()

    assert not scheduler.has_work
    assert (real.manager.statistics().num_used, real.manager.memory.host_pool.num_used) == (0, 0)
    for request_id, wish in wishes.items():
        for sample_idx, expected in enumerate(wish.answers):
            answer = service.answers.get((request_id, sample_idx), [])
            assert answer == (expected[: len(answer)] if request_id in aborted else expected)

    again = io.StringIO()
    for _ in replay_recording(recording.getvalue().splitlines(), EventLog(again)):
        pass
    assert again.getvalue() == log.getvalue()


def test_right_guesses_save_steps(make_service) -> None:
    service = make_service(SchedulerConfig(64, 4))
    expected = make_service.continue_prompt([1, 2, 3], 13)
    service.add(Request("a", [1, 2, 3], 13))
    num_steps = 0
    while service.scheduler.has_work:
        told = len(service.answers.get(("a", 0), []))
        drafts = {0: expected[told : told + 3]} if told else None
        service.finish(service.scheduler.schedule(service.clock, drafts))
        num_steps += 1

    assert service.answers["a", 0] == expected
    assert num_steps == 1 + 3  # The prompt and its first token, then four tokens a step.
    assert service.scheduler.draft_counters.num_accepted_drafts == 9
