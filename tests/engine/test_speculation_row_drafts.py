"""With a scheduler and a model: speculation changes how many steps it takes, and no token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model

from pagedkv import CacheConfig, KVCacheManager
from pagedkv.arrays import Int32s
from pagedkv.engine.model import PagedModel, inspect_model
from pagedkv.engine.sampling import Sampler, seed_for
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.speculation import Drafter, DraftModelDrafter, NgramDrafter, RowDrafts, accept_drafts, positions_of
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.errors import ConfigError
from pagedkv.scheduler import Request, Scheduler, SchedulerConfig, StepOutcome
from pagedkv.storage import KVStorage

BLOCK_SIZE = 4
NUM_NEW = 24
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
WARM = SamplingParams(max_tokens=NUM_NEW, temperature=0.6, top_k=20)


@cache
def model_of(seed: int) -> Any:
    return make_model("llama", seed=seed)


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    texts = {f"r{length}": rng.integers(1, VOCABULARY, length).tolist() for length in (5, 9, 17, 33)}
    # Something to quote.
    texts["again"] = [*texts["r9"], *texts["r9"], *texts["r9"]]
    return texts


class Loop:
    """The smallest engine that speculates."""

    def __init__(self, drafter: Drafter | None, *, num_blocks: int = 100, budget: int = 64) -> None:
        model = model_of(0)
        layers = inspect_model(model)
        storage = KVStorage(layers[0].kv_spec(len(layers), "float32", BLOCK_SIZE), num_blocks)
        self.model = PagedModel(model, layers, storage)
        self.storage = storage
        self.scheduler = Scheduler(
            SchedulerConfig(budget, 6), KVCacheManager(CacheConfig(num_blocks, block_size=BLOCK_SIZE))
        )
        self.sampler = Sampler(VOCABULARY)
        self.drafts = None if drafter is None else RowDrafts(drafter, self.scheduler, VOCABULARY)
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.num_steps, self.num_preemptions = 0, 0

    def run(self, params: SamplingParams, stops: Sequence[int] = (), num_samples: int = 1) -> None:
        for name, tokens in prompts().items():
            self.scheduler.add(Request(name, tokens, NUM_NEW, stop_token_ids=stops, n=num_samples), 0.0)
        while self.scheduler.has_work:
            self.step(params)
            self.num_steps += 1

    def step(self, params: SamplingParams) -> None:
        guesses = None if self.drafts is None else self.drafts.guess()
        plan = self.scheduler.schedule(0.0, guesses)
        memory = self.scheduler.manager.memory
        for row, name, sample_idx in plan.admitted:
            num_prompt = len(prompts()[name])
            known = memory.tokens.packed(np.array([row]), np.zeros(1, np.int64), memory.sequences.num_known[[row]])
            self.sampler.seat(row, params, seed=seed_for(3, sample_idx), num_prompt=num_prompt, known_token_ids=known)
            if self.drafts is not None:
                self.drafts.seat(row, (name, sample_idx), known, max_length=num_prompt + NUM_NEW)
        self.storage.apply(plan)
        logits = self.model.forward(StepInputs.of_plan(plan, self.scheduler.block_tables[plan.rows], self.model.device))
        rows, lengths = positions_of(plan)
        tokens = self.sampler.sample(logits, rows, lengths).token_ids
        outcome: Int32s | StepOutcome = tokens
        if plan.drafts is not None:
            accepted = accept_drafts(tokens, plan.drafts.token_ids, plan.drafts.num_tokens)
            outcome = StepOutcome(accepted.token_ids, accepted.num_tokens)
        events = self.scheduler.update(plan, outcome, 0.0)
        if self.drafts is not None:
            self.drafts.extend(events)
        for sample, _ in events.finished:
            key = (sample.request.request_id, sample.sample_idx)
            self.outputs[key] = sample.output_token_ids.tolist()
            self.num_preemptions += sample.num_preemptions
            if self.drafts is not None:
                self.drafts.end(key)
        self.scheduler.check_invariants()


@cache
def plain(params: SamplingParams, stops: tuple[int, ...] = (), num_samples: int = 1) -> Loop:
    loop = Loop(None)
    loop.run(params, stops, num_samples)
    return loop


def small_model(seed: int, num_blocks: int = 200) -> DraftModelDrafter:
    return DraftModelDrafter(model_of(seed), num_blocks=num_blocks, block_size=BLOCK_SIZE)


def test_the_loop_without_a_drafter_says_what_generate_says() -> None:
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}

    for name, tokens in prompts().items():
        generated = model_of(0).generate(torch.tensor([tokens]), **options)[0, len(tokens) :].tolist()
        assert plain(GREEDY).outputs[name, 0] == generated


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(("num_blocks", "budget"), [(100, 64), (26, 9)], ids=["ample", "tight"])
@pytest.mark.parametrize("kind", ["ngram", "same model", "other model", "short of memory"])
def test_tokens_are_those_of_plain_decoding(kind: str, budget: int, num_blocks: int, params: SamplingParams) -> None:
    drafters: dict[str, Drafter] = {
        "ngram": NgramDrafter(min_ngram=1),
        "same model": small_model(0),
        "other model": small_model(1),
        "short of memory": small_model(0, num_blocks=24),
    }
    drafter = drafters[kind]
    loop = Loop(drafter, num_blocks=num_blocks, budget=budget)

    loop.run(params)

    assert loop.outputs == plain(params).outputs
    assert (loop.num_preemptions > 0) == (num_blocks == 26)
    assert loop.scheduler.manager.statistics().num_used == 0
    if isinstance(drafter, DraftModelDrafter):
        drafter.manager.check_invariants()
        assert drafter.manager.statistics().num_used == 0


def test_the_target_as_its_own_draft_model_takes_a_fifth_of_the_steps() -> None:
    loop = Loop(small_model(0))

    loop.run(GREEDY)

    # Each request gets its first token by its prompt's step, then five in each step.
    counters = loop.scheduler.draft_counters
    assert plain(GREEDY).num_steps == 2 + NUM_NEW - 1
    assert loop.num_steps == 2 + 5
    assert counters.num_accepted_drafts == counters.num_drafts > 0


def test_samples_of_one_request_are_guessed_for_each_by_itself() -> None:
    loop = Loop(small_model(0))

    loop.run(WARM, (), 3)

    assert loop.outputs == plain(WARM, (), 3).outputs
    assert loop.outputs["r5", 0] != loop.outputs["r5", 1]
    assert loop.scheduler.draft_counters.num_accepted_drafts > 0


def test_a_stop_token_among_accepted_drafts_ends_the_answer_there() -> None:
    stops = (plain(GREEDY).outputs["r5", 0][7],)
    loop = Loop(small_model(0))

    loop.run(GREEDY, stops)

    assert loop.outputs == plain(GREEDY, stops).outputs
    assert loop.outputs["r5", 0][-1] == stops[0]
    assert len(loop.outputs["r5", 0]) <= 8


class Silent:
    """A drafter that notes what it is told, and guesses what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def check_target(self, vocab_size: int) -> None:
        if vocab_size > 1000:
            raise ConfigError("too many tokens")

    def begin(self, key: tuple[str, int], token_ids: Sequence[int] | Int32s, *, salt: bytes = b"") -> None:
        self.calls.append(("begin", key, list(token_ids), salt))

    def extend(self, key: tuple[str, int], token_ids: Sequence[int] | Int32s) -> None:
        self.calls.append(("extend", key, list(token_ids)))

    def end(self, key: tuple[str, int]) -> None:
        self.calls.append(("end", key))

    def propose(self, keys: Sequence[tuple[str, int]], max_drafts: Sequence[int]) -> list[Int32s]:
        self.calls.append(("propose", list(keys), list(max_drafts)))
        return [np.arange(limit, dtype=np.int32) for limit in max_drafts]


def test_a_drafter_is_told_of_every_token_and_asked_for_no_more_than_may_come() -> None:
    scheduler = Scheduler(SchedulerConfig(16, 2), KVCacheManager(CacheConfig(16, block_size=4)))
    drafter = Silent()
    drafts = RowDrafts(drafter, scheduler, VOCABULARY)
    scheduler.add(Request("a", [1, 2, 3], 4), 0.0)
    scheduler.add(Request("b", [5], 4), 0.0)

    assert drafts.guess() == {}
    plan = scheduler.schedule(0.0)
    (row_a, *_), (row_b, *_) = plan.admitted
    drafts.seat(row_a, ("a", 0), np.array([1, 2, 3], np.int32), max_length=7, salt=b"s")
    drafts.seat(row_b, ("b", 0), np.array([5], np.int32), max_length=0)
    drafts.extend(scheduler.update(plan, [8, 9], 0.0))
    guesses = drafts.guess()
    plan = scheduler.schedule(0.0, guesses)
    rows, lengths = positions_of(plan)
    drafts.extend(scheduler.update(plan, StepOutcome([0, 7, 6], [2, 1]), 0.0))
    # One more token may come for "a": there is nothing to guess before it.
    last = drafts.guess()
    drafts.end(("a", 0))
    drafts.end(("b", 0))

    assert {row: tokens.tolist() for row, tokens in guesses.items()} == {row_a: [0, 1]}
    assert rows.tolist() == [row_a, row_a, row_a, row_b]
    assert lengths.tolist() == [4, 5, 6, 2]
    assert last == {}
    assert drafter.calls == [
        ("begin", ("a", 0), [1, 2, 3], b"s"),
        ("extend", ("a", 0), [8]),
        ("propose", [("a", 0)], [2]),
        ("extend", ("a", 0), [0, 7]),
        ("end", ("a", 0)),
        ("end", ("b", 0)),
    ]


def test_a_drafter_that_cannot_guess_for_the_target_is_refused() -> None:
    scheduler = Scheduler(SchedulerConfig(16, 2), KVCacheManager(CacheConfig(4)))

    with pytest.raises(ConfigError, match="too many tokens"):
        RowDrafts(Silent(), scheduler, 2000)
