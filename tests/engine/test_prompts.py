"""The forms in which prompts, parameters and conversations are taken, and the one error for all others."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from tokenizers_for_tests import make_tokenizer

from pagedkv import InvalidArgumentError
from pagedkv.engine import LLM, AsyncLLM, SamplingParams
from pagedkv.engine.prompts import as_conversations, as_prompt, as_prompts

ONE = SamplingParams(max_tokens=1, temperature=0)
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(make_model("llama", vocab_size=267), make_tokenizer(), num_blocks=64, block_size=4, self_check=False)


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        np.array([5, 6]),
        [np.int64(5), np.int64(6)],
        torch.tensor([5, 6]),
        {"input_ids": [5, 6], "attention_mask": [1, 1]},
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]},
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_a_row_of_token_ids_is_one_prompt(prompt: Any) -> None:
    assert [list(each) for each in as_prompts(prompt)] == [[5, 6]]
    assert list(as_prompt(prompt)) == [5, 6]


@pytest.mark.parametrize(
    "prompts",
    [
        [[5, 6], [7]],
        (np.array([5, 6]), torch.tensor([7])),
        iter([[5, 6], [7]]),
        {"input_ids": [[5, 6], [7]]},
        {"input_ids": torch.tensor([[5, 6], [0, 7]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])},
    ],
    ids=["lists", "arrays", "iterator", "mapping", "padded"],
)
def test_several_rows_are_several_prompts(prompts: Any) -> None:
    assert [list(each) for each in as_prompts(prompts)] == [[5, 6], [7]]


def test_a_2d_tensor_holds_a_prompt_in_each_row() -> None:
    assert as_prompts(torch.tensor([[5, 6], [7, 8]])) == [[5, 6], [7, 8]]
    assert as_prompts(np.array([[5, 6], [7, 8]])) == [[5, 6], [7, 8]]
    assert as_prompt(torch.tensor([[5, 6]])) == [5, 6]
    assert as_prompts(np.array(["a", "b"])) == ["a", "b"]


def test_what_the_tokenizer_returned_is_completed_as_its_texts_are(llm: LLM) -> None:
    texts = ["the sun", "on a hill in the sun"]
    tokenizer = llm.tokenizer
    tokenizer.pad_token = tokenizer.eos_token

    outputs = llm.generate(tokenizer(texts, return_tensors="pt", padding=True), ONE)

    assert [output.prompt_token_ids for output in outputs] == [
        output.prompt_token_ids for output in llm.generate(texts, ONE)
    ]
    single = tokenizer(texts[0], return_tensors="pt")
    assert sum((piece.token_ids for piece in llm.stream(single, ONE)), ()) == outputs[0].token_ids
    assert llm.generate(texts[0], ONE)[0].prompt == texts[0]


@pytest.mark.parametrize(
    "prompts",
    [
        5,
        None,
        b"abc",
        {"prompt": "a"},
        {"input_ids": [5, 6], "attention_mask": [1]},
        {"input_ids": [[5, 6]], "attention_mask": [1]},
        [5, "a"],
        [True, False],
        ["a", 5],
        ["a", None],
        torch.tensor(5),
        torch.tensor([0.5]),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        "\ud800",
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt"):
        llm.generate(prompts, ONE)

    assert not llm.engine.has_work


def test_no_prompts_have_no_outputs(llm: LLM) -> None:
    assert llm.generate([], ONE) == []


@pytest.mark.parametrize("prompt", [torch.tensor([[5], [6]]), {"input_ids": [[5], [6]]}, ["a", "b"]], ids=str)
def test_a_stream_takes_one_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt"):
        llm.stream(prompt, ONE)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "many", 5, [5]], ids=str)
def test_what_is_no_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="params must be SamplingParams"):
        llm.generate("a", params)
    with pytest.raises(InvalidArgumentError, match="params must be SamplingParams"):
        llm.stream("a", params)
    with pytest.raises(InvalidArgumentError, match="params must be BeamSearchParams"):
        llm.beam_search("a", params)


def test_a_conversation_or_several_are_taken() -> None:
    assert as_conversations(HELLO) == [HELLO]
    assert as_conversations([HELLO, tuple(HELLO)]) == [HELLO, HELLO]


@pytest.mark.parametrize(
    "conversation", [[], [[]], "Hello?", ["Hello?"], HELLO[0], None, [HELLO, "Hello?"], [*HELLO, "more"]], ids=str
)
def test_what_is_no_conversation_is_refused(llm: LLM, conversation: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="a conversation is messages"):
        llm.chat(conversation, ONE)


def test_what_the_template_refuses_and_other_kinds_of_results_are_bad_arguments(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="the chat template refuses these messages"):
        llm.chat([{"role": "user", "content": "\ud800"}], ONE)
    with pytest.raises(InvalidArgumentError, match="tokenize: a chat's prompt is always token ids"):
        llm.chat(HELLO, ONE, tokenize=False)


@pytest.mark.parametrize("seed", [-1, "a", 0.5, 2**64])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="seed must be"):
        LLM(make_model("llama"), num_blocks=8, seed=seed)


def test_an_async_llm_refuses_the_same() -> None:
    llm = LLM(make_model("llama", vocab_size=267), make_tokenizer(), num_blocks=64, self_check=False)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            for prompt, params in ((None, ONE), ("\ud800", ONE), (["a", "b"], ONE), ("a", {"max_tokens": 1})):
                with pytest.raises(InvalidArgumentError):
                    await engine.generate(prompt, params)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgumentError):
                await engine.chat([])
            assert len((await engine.generate({"input_ids": [5, 6]}, ONE)).token_ids) == 1

    asyncio.run(main())
