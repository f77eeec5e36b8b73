"""Running rows that share a prefix read it once in each decode step, and get the tokens that they would get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model

from pagedkv.attention import shared_prefixes
from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.step_inputs import StepInputs

NUM_NEW = 12
# Their layers have windows or ALiBi, where a query must know its distance from each key.
SHARES_NOTHING = {"mistral", "bloom"}


def interleaved_prompts() -> list[list[int]]:
    """Two prefixes of 24 tokens, taken in turn, and a prompt of its own."""
    rng = np.random.default_rng(3)
    heads = [rng.integers(1, VOCABULARY, 24).tolist() for _ in range(2)]
    return [
        *[heads[i % 2] + rng.integers(1, VOCABULARY, 3 + i).tolist() for i in range(5)],
        rng.integers(1, VOCABULARY, 9).tolist(),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_rows_that_share_prefixes_equal_those_of_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefixes, "LEAST_SAVED", 1)
    shared: list[bool] = []
    plan_for = StepInputs.plan_for

    def noted(self, *heads, **options):
        made = plan_for(self, *heads, **options)
        shared.append(made.shares_prefixes)
        return made

    monkeypatch.setattr(StepInputs, "plan_for", noted)
    model, prompts = make_model(family), interleaved_prompts()
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    expected = [tuple(model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist()) for p in prompts]

    outputs = LLM(model, num_blocks=128, block_size=4, self_check=False).generate(
        prompts, SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    )

    assert [output.token_ids for output in outputs] == expected
    assert any(shared) == (family not in SHARES_NOTHING)
