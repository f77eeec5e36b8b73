"""Greedy tokens of every family equal those of transformers' own `generate`, whatever the engine has to do meanwhile."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model

from pagedkv.engine import LLM, SamplingParams
from pagedkv.scheduler import SchedulerConfig

NUM_NEW = 20
PROMPT_LENGTHS = (5, 17, 33, 60)
# (29 + 37 + 53 + 80) tokens in blocks of 4.
AMPLE, TIGHT = 64, 21
POOLS = {"ample": (AMPLE, None), "tight, recompute": (TIGHT, None), "tight, swap": (TIGHT, "1MiB")}
# Chunk -> tokens in a step, and the cap on one prompt's share of it.
CHUNKS = {1: (8, 1), 7: (11, 7), 512: (512, None)}
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)


@cache
def model_of(family: str) -> Any:
    return make_model(family)


@cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCABULARY, length).tolist() for length in PROMPT_LENGTHS]
    texts[3][:30] = texts[2][:30]  # what a prefix cache can share
    return texts


@cache
def generated(family: str) -> list[tuple[int, ...]]:
    model = model_of(family)
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    return [tuple(model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist()) for p in prompts()]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_generate(family: str, pool: str, prefix_caching: bool, chunk: int) -> None:
    num_blocks, swap_memory = POOLS[pool]
    budget, cap = CHUNKS[chunk]
    llm = LLM(
        model_of(family),
        num_blocks=num_blocks,
        block_size=4,
        swap_memory=swap_memory,
        prefix_caching=prefix_caching,
        scheduler_config=SchedulerConfig(budget, 4, long_prefill_tokens=cap),
        self_check=False,
    )

    outputs = llm.generate(prompts(), GREEDY)

    assert [output.token_ids for output in outputs] == generated(family)
    assert (sum(output.timings.num_preemptions for output in outputs) > 0) == (num_blocks == TIGHT)
    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.manager.statistics().num_used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_finds_the_paged_model_equal(family: str) -> None:
    LLM(model_of(family), num_blocks=1)


def test_the_random_models_say_different_things_to_different_prompts() -> None:
    for family in FAMILIES:
        assert len({tokens[:8] for tokens in generated(family)}) == len(PROMPT_LENGTHS)
        assert len({token for tokens in generated(family) for token in tokens}) >= 10
