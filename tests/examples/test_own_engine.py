"""The engine of one's own: scheduler, storage and op together, without transformers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_engine.py"))
HEADS, KV_HEADS, DIM = EXAMPLE["HEADS"], EXAMPLE["KV_HEADS"], EXAMPLE["DIM"]
PROMPTS = [[(7 * i + j) % 256 for j in range(10 + 3 * i)] for i in range(5)]


def generate_unpaged(prompt: list[int], num_new: int) -> list[int]:
    """The same model on one sequence, its whole text computed anew for every token."""
    text = list(prompt)
    for _ in range(num_new):
        hidden = EXAMPLE["embedding"][text] + torch.arange(len(text))[:, None].sin()
        for projection in EXAMPLE["projections"]:
            heads = (
                (functional.layer_norm(hidden, hidden.shape[1:]) @ projection).unflatten(1, (-1, DIM)).transpose(0, 1)
            )
            query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS))
            keys, values = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
            out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
            hidden = hidden + out.transpose(0, 1).flatten(1)
        text.append(int((hidden[-1] @ EXAMPLE["embedding"].T).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(("num_blocks", "is_tight"), [(24, True), (200, False)])
def test_tokens_are_those_of_unpaged_attention_with_and_without_swapping(num_blocks: int, is_tight: bool) -> None:
    texts, num_swapping = EXAMPLE["generate"](PROMPTS, num_new=20, num_blocks=num_blocks)

    assert (num_swapping > 0) == is_tight
    assert texts == [generate_unpaged(prompt, 20) for prompt in PROMPTS]


def test_it_stays_short() -> None:
    assert len(Path(EXAMPLE["__file__"]).read_text().splitlines()) <= 60
