"""What is set aside for a step suffices for the largest one that comes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagedkv.engine import LLM, MemoryBudgetError, NgramDrafter, SamplingParams, building
from pagedkv.engine.largest_step import LargestStep
from pagedkv.engine.memory_budget import MemoryBudget, _peak_growth, can_measure
from pagedkv.engine.model import PagedModel
from pagedkv.storage import KVStorage

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process takes")


def make_model(*, vocab_size: int, max_length: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[MemoryBudget]:
    """The budgets that were measured."""
    measured: list[MemoryBudget] = []
    measure = building.measure_budget

    def keep(*args: Any) -> MemoryBudget:
        return_freed_memory()
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(building, "measure_budget", keep)
    return measured


def return_freed_memory() -> None:
    """What the C library keeps of freed memory would be taken again without growth."""
    ctypes.CDLL(None).malloc_trim(0)


def check_that_it_suffices(budgets: list[MemoryBudget], serve: Callable[[], object], *, at_least: int) -> None:
    return_freed_memory()
    needed = _peak_growth(serve)

    assert needed >= at_least
    assert needed <= 1.5 * budgets[0].step_bytes


def test_the_logits_of_all_seats_and_their_sampling_are_in_the_largest_step(budgets: list[MemoryBudget]) -> None:
    llm = LLM(make_model(vocab_size=50_000, max_length=512), kv_memory="1MiB", self_check=False, max_num_running=64)
    prompts = [[5 + idx, 6, 7] for idx in range(64)]

    check_that_it_suffices(
        budgets, lambda: llm.generate(prompts, SamplingParams(max_tokens=2, top_p=0.9)), at_least=50 * MIB
    )


def test_a_step_of_more_tokens_than_a_sequence_may_have_is_the_largest(budgets: list[MemoryBudget]) -> None:
    llm = LLM(
        make_model(vocab_size=100, max_length=128), kv_memory="4MiB", self_check=False, max_num_batched_tokens=8192
    )
    prompts = [[5 + idx, *[6] * 120] for idx in range(66)]

    check_that_it_suffices(budgets, lambda: llm.generate(prompts, SamplingParams(max_tokens=1)), at_least=10 * MIB)


def test_the_positions_that_drafts_are_verified_at_are_in_the_largest_step(budgets: list[MemoryBudget]) -> None:
    model = make_model(vocab_size=50_000, max_length=512)
    drafter = NgramDrafter(num_drafts=7, min_ngram=1)
    llm = LLM(model, kv_memory="1MiB", self_check=False, max_num_running=16, drafter=drafter)
    prompts = [[5 + idx, 6, 7, 5 + idx, 6, 7] for idx in range(16)]

    check_that_it_suffices(
        budgets, lambda: llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0)), at_least=5 * MIB
    )


@pytest.mark.parametrize("max_length", [128, None])
def test_the_largest_steps_write_nothing(max_length: int | None) -> None:
    model = make_model(vocab_size=100, max_length=128)
    layers = building.inspect_model(model)
    storage = KVStorage(layers[0].kv_spec(len(layers), "float32", 16), 1, torch.device("cpu"))
    largest = LargestStep(
        PagedModel(model, layers, storage),
        max_num_batched_tokens=300,
        max_num_running=4,
        max_length=max_length,
        num_drafts=None,
    )
    before = storage._buffers["device"].clone()

    largest.run()
    largest.run_decodes()

    assert torch.equal(storage._buffers["device"], before)


def test_a_device_whose_memory_cannot_be_measured_is_refused_by_name() -> None:
    assert not can_measure(torch.device("mps"))
    with pytest.raises(MemoryBudgetError, match="the memory of mps cannot be measured, only that of cpu and cuda"):
        MemoryBudget(2, 2, 1).granted(None, "mps")
