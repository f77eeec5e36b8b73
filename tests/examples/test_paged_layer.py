"""The layer that scheduler, storage and op serve together."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "paged_layer.py"))
PROMPTS = [[(7 * i + j) % 512 for j in range(10 + 3 * i)] for i in range(5)]


@pytest.mark.parametrize(("num_blocks", "is_tight"), [(24, True), (200, False)])
def test_tokens_are_those_of_unpaged_attention_with_and_without_swapping(num_blocks: int, is_tight: bool) -> None:
    texts, num_preemptions = EXAMPLE["generate"](PROMPTS, num_new=20, num_blocks=num_blocks)

    assert (num_preemptions > 0) == is_tight
    assert texts == {f"request {i}": EXAMPLE["generate_unpaged"](prompt, 20) for i, prompt in enumerate(PROMPTS)}
